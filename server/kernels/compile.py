"""Compiles the kernels of a server side by side at start-up, with progress.

Triton compiles a kernel when it is first launched, one after another. Its passes and LLVM work without Python's lock
and ptxas is a process of its own, so threads do it side by side (12 matrix products for Hopper: 6.6 s in one thread,
3.4 s in two, on two cores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from triton import AsyncCompileMode

from server.kernels.runtime import INTERPRETED

Say = Callable[[str], None]

_PROGRESS_LINES = 5


class _Collector(AsyncCompileMode):  # type: ignore[misc]
    """Notes what launches would have to compile. Nothing is compiled, and the launches do not happen."""

    def __init__(self) -> None:
        super().__init__(executor=None)
        self.wanted: dict[str, tuple[Callable[[], Any], list[Callable[[Any], None]]]] = {}

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> None:
        """Triton's launcher calls this; `finalize_fn` gives the compiled kernel to later launches."""
        self.wanted.setdefault(key, (compile_fn, []))[1].append(finalize_fn)


def compile_all(
    jobs: Sequence[Callable[[], object]], num_threads: int, say: Say = lambda text: None, launch: bool = True
) -> int:
    """Runs warm-up launches, but compiles what they need beforehand, `num_threads` kernels at a time.

    Jobs run twice, in this thread: first to see which kernels they launch, then really. The first time no Triton kernel
    runs that was not launched before, so what it would write is undefined: nothing in a job may use such values as an
    index, synchronise on them or capture a graph. Returns how many kernels were compiled or read from Triton's cache.
    A kernel that does not compile is said, and raises when its job runs. `launch` False leaves out the second time: for
    candidates of a `Tuner`, which runs them itself and does without those that fail.
    """
    count = 0
    if not INTERPRETED:
        collector = _Collector()
        with collector:
            for job in jobs:
                job()
        count = len(collector.wanted)
        _compile(collector, num_threads, say)
    if launch:
        for job in jobs:
            job()
    return count


def _compile(collector: _Collector, num_threads: int, say: Say) -> None:
    wanted = list(collector.wanted.values())
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    step = -(-len(wanted) // _PROGRESS_LINES)
    with ThreadPoolExecutor(max(num_threads, 1), initializer=_use_device, initargs=(device,)) as pool:
        futures = {pool.submit(_compile_one, compile_fn): finalizers for compile_fn, finalizers in wanted}
        for done, future in enumerate(as_completed(futures), start=1):
            error = future.exception()
            if error is not None:
                say(f"a kernel does not compile: {error}")
            else:
                for finalize in futures[future]:
                    finalize(future.result())
            if done % step == 0 or done == len(wanted):
                say(f"compiling kernels {done}/{len(wanted)}")


def _use_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _compile_one(compile_fn: Callable[[], Any]) -> Any:
    kernel = compile_fn()
    # Asking for the launcher builds it (in Triton 3.6 with a C compiler) and loads the kernel into the GPU.
    _ = kernel.run
    return kernel
