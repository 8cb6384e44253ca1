"""Whether a device holds a canary: three engines side by side, control, candidate and baseline. No torch."""

from __future__ import annotations

from math import prod
from pathlib import Path

from server.config import EngineConfig
from server.models.gguf_form import FormOn
from server.models.source import load_index, resolve
from server.telemetry.gpus import Gpus

DEVICE_SHARE = 1 / 3
"""Of the device's memory for each of the three engines, unless the settings divide it."""
LARGEST_MODEL = 0.2
"""The largest share of the device's memory that weights may have: three fifths for three copies of them, the rest for
their KV caches, steps and graphs."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = ("F64", "F32", "BF16", "F16")


def no_room(config: EngineConfig) -> str | None:
    """Why three engines of this model do not fit, by `LARGEST_MODEL`; None: they do. Raises ModelSourceError."""
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and Path("/dev/nvidiactl").exists())
    memory = _gpu_bytes(config.device) if on_gpu else _system_bytes()
    if memory is None:
        return "the memory of the GPU is not known (pip install 'outpace[gpu]' tells it)"
    weights = weight_bytes(config, on_gpu=on_gpu)
    if weights <= LARGEST_MODEL * memory:
        return None
    return (
        f"the weights take {weights / 2**30:,.1f} GiB, more than a fifth of the {memory / 2**30:,.1f} GiB of the "
        f"{'GPU' if on_gpu else 'free memory'} (a canary needs three engines side by side)"
    )


def weight_bytes(config: EngineConfig, *, on_gpu: bool) -> int:
    """Bytes of the original's weights in the dtype that they are served in."""
    auto = "bfloat16" if on_gpu else "float32"
    wanted = _BYTES[auto if config.dtype == "auto" else config.dtype]
    total = 0
    for entry in load_index(
        resolve(config.model, form=FormOn(config.weights, "cuda" if on_gpu else "cpu", config.dtype)).directory
    ).values():
        total += prod(entry.shape) * (wanted if entry.dtype in _FLOATS else 1)
    return total


def _gpu_bytes(device: str) -> int | None:
    number = device.partition(":")[2]
    readings = {reading.index: reading.memory_total_bytes for reading in Gpus().read()}
    return readings.get(int(number) if number.isdigit() else 0)


def _system_bytes() -> int | None:
    """What this machine has available, or the control group's limit if that is less."""
    found: list[int] = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        pass
    return min(found, default=None)
