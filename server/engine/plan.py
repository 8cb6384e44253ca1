"""What goes where in a device's memory, known before anything is loaded: `outpace plan`, and what `serve` refuses.

The networks are sketched on torch's `meta` device by the code that loads them, and the KV pool is divided by the same
arithmetic, so what is planned is what serving allocates. Estimates are the working memory of a GPU's steps and the
context that CUDA takes on a device that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from server.config import ConfigError, EngineConfig
from server.engine.defaults import max_positions, with_defaults
from server.engine.drafters import draft_needs, load_draft_network
from server.engine.footprint import META, as_on, tensor_bytes
from server.engine.memory import SMALLER_STEPS, DeviceMemory, Memory, plan_memory, within
from server.models.base import TargetModel
from server.models.loader import load_source, pick_dtype
from server.models.source import ModelSource

if TYPE_CHECKING:
    from server.engine.drafters import DraftNetwork

Find = Callable[[str], ModelSource]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Every byte of a device by its use. `config` has its defaults settled; `drafter` is `none` without drafts."""

    config: EngineConfig
    device: DeviceMemory
    model: str
    kind: str
    architecture: str
    num_parameters: int
    dtype: str
    drafter: str
    draft_model: str | None
    target_bytes: int
    draft_bytes: int
    memory: Memory

    @property
    def weight_bytes(self) -> int:
        """Of target and drafter."""
        return self.target_bytes + self.draft_bytes

    @property
    def num_blocks(self) -> int:
        """Of the KV pool, null block included; 0 where there is no room for one beside it."""
        return self.memory.num_blocks if self.memory.num_blocks > 1 else 0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return max(0, self.num_blocks - 1) * self.config.block_size

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len or 1

    @property
    def full_sequences(self) -> int:
        """Sequences of full length that the KV pool holds at once."""
        return max(0, self.num_blocks - 1) // -(-self.max_model_len // self.config.block_size)

    def parts(self) -> dict[str, int]:
        """Bytes by use; together they are the device's. `left` is negative where memory does not suffice."""
        block, blocks = self.memory.block, self.num_blocks
        used = {
            "in_use": self.device.total - self.device.free,
            "target_weights": self.target_bytes,
            "drafter_weights": self.draft_bytes,
            "steps": self.memory.step_bytes,
            "target_kv": blocks * block.target,
            "drafter_kv": blocks * block.draft,
            "drafter_features": blocks * block.draft_extra + self.memory.slot_bytes,
        }
        return {**used, "left": self.device.total - sum(used.values())}

    def shortage(self) -> str | None:
        """Why the engine does not fit and which settings would help, in one line; None if it fits."""
        room = self.device.free - self.weight_bytes
        rest = room - self.memory.step_bytes - self.memory.slot_bytes
        block, tokens = self.memory.block.total, self.config.kv_cache_tokens
        if room < 0 or rest < 0:
            account = self._account(steps=room >= 0, short=-room if room < 0 else -rest)
            advice = self._smaller_weights() if room < 0 else self._more_room(rest)
            return f"not enough memory for {self.model}: {account}; {advice}"
        if tokens is not None and self.memory.pool_bytes > rest:
            most = max(0, rest // block - 1) * self.config.block_size
            advice = f"{most} tokens fit" if most else self._more_room(rest)
            return f"kv_cache_tokens: {tokens} take {size(self.memory.pool_bytes)}: {self._account()}; {advice}"
        if self.num_blocks == 0:
            advice = "raise the share" if rest >= 2 * block else self._more_room(rest)
            share = self.config.kv_memory_share
            return (
                f"kv_memory_share: {share} of {size(rest)} holds not one block of {size(block)}: {self._account()}; "
                f"{advice}"
            )
        return None

    def check(self) -> None:
        """Raises ConfigError with the numbers if the engine does not fit."""
        reason = self.shortage()
        if reason is not None:
            raise ConfigError(reason)

    def _account(self, *, steps: bool = True, short: int = 0) -> str:
        """The sum that does not work out."""
        parts = [f"the weights take {size(self.target_bytes)} in {self.dtype}"]
        if self.draft_bytes:
            parts.append(f"the drafter's {size(self.draft_bytes)}")
        if steps and self.memory.step_bytes:
            parts.append(f"steps {size(self.memory.step_bytes + self.memory.slot_bytes)}")
        of = f"the {self.device.name} has {size(self.device.free)} free of {size(self.device.total)}"
        if self.config.device_share is not None:
            of += f" (device_share {self.config.device_share:g})"
        return f"{of}, {', '.join(parts)}" + (f": {size(short)} too much" if short else "")

    def _smaller_weights(self) -> str:
        """What helps where weights do not fit."""
        ways = ["set dtype to bfloat16 (half as much)"] if self.dtype == "float32" else []
        if self.draft_bytes and self.target_bytes <= self.device.free:
            ways.append("choose a smaller draft_model or a drafter without one")
        return ", ".join([*ways, f"take a smaller model, or {self._more_memory()}"])

    def _more_room(self, rest: int) -> str:
        """What helps where weights fit and the rest does not; settings only if they could."""
        memory = self.memory
        if rest + memory.step_bytes - memory.least_step_bytes >= 2 * memory.block.total:
            return f"lower {SMALLER_STEPS}, or {self._more_memory()}"
        if self.draft_bytes:
            return f"choose a smaller draft_model or a drafter without one, or {self._more_memory()}"
        return self._more_memory()

    def _more_memory(self) -> str:
        return "take a larger device" if self.device.assumed else "free memory"


def plan_engine(config: EngineConfig, device: torch.device, memory: DeviceMemory, find: Find) -> MemoryPlan:
    """The plan for an engine that is not loaded; nothing but headers and configurations is read.

    Raises ConfigError, ModelSourceError, UnsupportedModelError or WeightsError for what would be refused at loading.
    """
    source = find(config.model)
    config = with_defaults(config, device, source)
    positions = max_positions(config)
    model = load_source(source, META, pick_dtype(config.dtype, device), positions)
    draft = load_draft_network(config, model, source, device, positions, lambda text: None, find)
    as_on(device, [model, draft])
    return make_plan(config, source, model, draft, memory, find)


def make_plan(
    config: EngineConfig,
    source: ModelSource,
    model: TargetModel,
    draft: DraftNetwork | None,
    memory: DeviceMemory,
    find: Find,
) -> MemoryPlan:
    """The plan of these networks, sketched or loaded; what `memory` calls free is so before they are loaded."""
    memory = within(memory, config.device_share)
    target_bytes = tensor_bytes(model)
    draft_bytes = tensor_bytes([model, draft]) - target_bytes  # a head shares the target's embedding
    needs = draft_needs(draft, config.max_draft_tokens)
    available = memory.free - target_bytes - draft_bytes
    return MemoryPlan(
        config=config,
        device=memory,
        model=source.name,
        kind=source.kind,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        drafter=config.drafter if config.max_draft_tokens else "none",
        draft_model=find(config.draft_model).name if draft is not None and config.draft_model is not None else None,
        target_bytes=target_bytes,
        draft_bytes=draft_bytes,
        memory=plan_memory(config, model, needs, memory.type, available),
    )


def size(num_bytes: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << scale:
            value = num_bytes / (1 << scale)
            return f"{value:,.2f} {unit}" if unit == "GiB" else f"{value:,.0f} {unit}"
    return f"{num_bytes:,} bytes"
