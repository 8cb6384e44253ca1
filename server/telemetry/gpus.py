"""Memory, utilisation, power and energy of the GPUs this server sees, from NVML (`nvidia-ml-py`, optional)."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU now; `index` as CUDA counts. `energy_j` counts since the driver was loaded. None: it does not say."""

    index: int
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilisation: float | None = None
    power_w: float | None = None
    energy_j: float | None = None


class Gpus:
    """Reads all GPUs of `CUDA_VISIBLE_DEVICES`. Without library, driver or GPU there are none."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml
        self._handles: list[Any] = []
        try:
            if self._nvml is None:
                self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handles = self._visible()
        except ImportError:
            return
        except self._nvml.NVMLError as error:
            logger.debug("no GPU metrics: %s", error)

    def _visible(self) -> list[Any]:
        nvml, visible = self._nvml, os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return [
            nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]

    def read(self) -> list[GpuReading]:
        """All of them now."""
        return [self._read(index, handle) for index, handle in enumerate(self._handles)]

    def _read(self, index: int, handle: Any) -> GpuReading:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        energy_mj = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return GpuReading(
            index,
            None if memory is None else int(memory.used),
            None if memory is None else int(memory.total),
            None if rates is None else rates.gpu / 100,
            None if power_mw is None else power_mw / 1e3,
            None if energy_mj is None else energy_mj / 1e3,
        )

    def _ask(self, function: Any, handle: Any) -> Any:
        """None for what this GPU does not support (a MIG slice has no power of its own)."""
        try:
            return function(handle)
        except self._nvml.NVMLError:
            return None
