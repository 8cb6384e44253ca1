"""From a network on a GPU to its runner: kernels, drafter, graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from draft_models.protocol import DeviceDrafter
from server.config import ConfigError, EngineConfig
from server.engine.gpu.kernel_forward import AttentionKernels, make_forward, num_threads
from server.engine.gpu.kernel_ops import KernelOps
from server.engine.gpu.runner import GpuParts, GpuRunner
from server.engine.speculation import draft_tiers
from server.engine.step_runner import RunnerShape
from server.kernels.compile import compile_all
from server.models.base import TargetModel
from server.models.llama import LlamaModel

Say = Callable[[str], None]


def build_gpu_runner(
    config: EngineConfig, model: TargetModel, drafter: DeviceDrafter | None, shape: RunnerShape, say: Say
) -> GpuRunner:
    """A runner whose graphs are captured. Raises ConfigError for what this network's path can not do."""
    own = isinstance(model, LlamaModel)
    chain = getattr(drafter, "learned", drafter)  # of a hybrid drafter, the part with a network
    capturable = own and not isinstance(getattr(chain, "forward", None), AttentionKernels)
    if not own and (config.deterministic or config.kv_cache_dtype != "auto"):
        wanted = "deterministic" if config.deterministic else "kv_cache_dtype"
        raise ConfigError(f"{wanted}: {model.architecture} runs through transformers, which has no such path")
    forward = make_forward(model, config.deterministic, say)
    most = shape.max_draft_tokens if drafter is not None else 0
    tiers = draft_tiers(most) if config.adaptive else (most,)
    parts = GpuParts(
        forward=forward,
        ops=KernelOps(shape.rule),
        drafter=drafter,
        graphs=config.cuda_graphs and capturable,
        deterministic=config.deterministic,
        kv_dtype=torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else None,
        linear_path=("triton-invariant" if config.deterministic else "triton+cublas") if own else "torch",
        prompt_tokens=0 if config.deterministic else config.max_num_batched_tokens or 0,
    )
    runner = GpuRunner(model, parts, shape, tuple(k for k in tiers if k > 0))
    if capturable:  # in every mode, so that no request waits for a compiler
        compile_all(runner.executor.warm_up_jobs(config.max_num_batched_tokens or 1), num_threads(), say)
    if not parts.graphs:
        say(
            "steps run eagerly: "
            + ("a network that runs through transformers is not captured" if not capturable else "CUDA graphs are off")
        )
        return runner
    executor = runner.executor
    executor.prompts.choose()
    say(f"capturing CUDA graphs for {len(executor.tiers)} batch sizes and k of {executor.k_tiers}")
    executor.capture()
    stats = executor.graphs.stats
    say(f"captured {stats.num_graphs} CUDA graphs, {stats.memory_bytes >> 20} MiB")
    tiers = executor.prompts.tiers
    say(f"prompt chunks of up to {tiers[-1]} tokens run from graphs" if tiers else "prompt chunks run eagerly")
    return runner
