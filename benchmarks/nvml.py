"""A GPU's energy counter, by NVIDIA's management library."""

from __future__ import annotations

import ctypes

_DONE = 0


class EnergyCounter:
    """Joules that GPU `index` has taken since its driver was loaded.

    The counter moves every 20 to 100 ms: measure a second at least. Raises OSError where there is no such library,
    RuntimeError where the GPU has no counter.
    """

    def __init__(self, index: int = 0) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(self._device))
        self.joules()

    def joules(self) -> float:
        """Since the driver was loaded."""
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(value))
        return value.value / 1e3

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != _DONE:
            raise RuntimeError(f"{name} failed with status {code}")


def energy_counter() -> EnergyCounter | None:
    """The first GPU's, None where there is none that counts."""
    try:
        return EnergyCounter()
    except (OSError, RuntimeError, AttributeError):
        return None
