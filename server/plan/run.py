"""Makes the plan and prints it."""

from __future__ import annotations

import json
from functools import cache, partial

import torch

from server.config import ConfigError
from server.engine.memory import DeviceMemory, assume, measure
from server.engine.plan import MemoryPlan, plan_engine
from server.models.config import UnsupportedModelError
from server.models.gguf_form import FormOn
from server.models.loader import WeightsError, pick_device
from server.models.peek import peek
from server.plan.options import PlanOptions
from server.plan.report import as_json, as_text

UNUSABLE = (UnsupportedModelError, WeightsError)
"""What a model is that can not be served anywhere."""


def print_plan(options: PlanOptions) -> bool:
    """Whether the engine fits. Raises what `plan_engine` raises."""
    plan = plan_for(options)
    print(json.dumps(as_json(plan), indent=2, ensure_ascii=False) if options.json else as_text(plan), flush=True)
    return plan.shortage() is None


def plan_for(options: PlanOptions) -> MemoryPlan:
    """The plan for this machine's device or for the one that the options describe."""
    device = _device(options)
    form = FormOn(options.engine.weights, device.type, options.engine.dtype)
    return plan_engine(options.engine, device, _memory(options, device), cache(partial(peek, form=form)))


def _device(options: PlanOptions) -> torch.device:
    """A device that is not there need not be; `auto` is this machine's kind."""
    name = options.engine.device
    if options.device_memory is None or name == "auto":
        try:
            return pick_device(name)
        except ConfigError as error:
            hint = "; to plan for another machine's, say how large it is with --device-memory"
            raise ConfigError(f"{error}{hint if name.startswith('cuda') else ''}") from None
    kind = name.split(":")[0]
    return torch.device(kind) if kind in ("cpu", "cuda") else pick_device(name)


def _memory(options: PlanOptions, device: torch.device) -> DeviceMemory:
    return measure(device) if options.device_memory is None else assume(options.device_memory, device)
