from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from server.kernels.compile import compile_all

SCRIPT = '''
import sys, threading
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from server.kernels.compile import compile_all
from server.kernels.activation import silu_mul
from server.kernels.norm import rms_norm

launched = []

class Launcher:
    def __init__(self, src, metadata):
        self.name = src.fn.__name__
    def __call__(self, *args):
        launched.append(self.name)

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}
    def load_binary(self, name, binary, shared, device):
        return object(), object(), 0, 0, 1024

class Hopper:
    """A driver without a device: kernels compile for sm_90, launches are counted."""
    utils, launcher_cls = Utils(), Launcher
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Hopper())
compiled, lock = [], threading.Lock()

def listener(src, metadata, metadata_group, times, cache_hit):
    with lock:
        compiled.append((threading.get_ident(), cache_hit))

triton.knobs.compilation.listener = listener
weight = torch.ones(64)
jobs = [lambda w=w: silu_mul(torch.ones(2, 2 * w)) for w in (64, 128, 256, 512)]
jobs += [lambda: rms_norm(torch.ones(2, 64), weight, 1e-5), jobs[0]]
how, threads = sys.argv[1], int(sys.argv[2])
said = []
if how != "launch":
    count = compile_all(jobs, threads, said.append, launch=how == "all")
else:
    count = len([job() for job in jobs])
print({
    "count": count,
    "launched": len(launched),
    "misses": sum(not hit for _, hit in compiled),
    "hits": sum(hit for _, hit in compiled),
    "threads": len({thread for thread, _ in compiled} - {threading.get_ident()}),
    "said": said,
})
'''


def run(how: str, threads: int, cache: Path) -> dict[str, object]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(threads)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = eval(done.stdout)
    return found


def test_compiles_side_by_side_into_the_cache_of_launches(tmp_path: Path) -> None:
    found = run("all", 2, tmp_path)
    assert found["count"] == 5  # the sixth job needs the first one's kernel
    assert found["misses"] == 5 and found["hits"] == 0  # each once, none by a launch
    assert found["threads"] == 2
    assert found["launched"] == 6
    assert found["said"] == [f"compiling kernels {i}/5" for i in range(1, 6)]
    later = run("launch", 1, tmp_path)
    only = run("compile", 2, tmp_path)
    assert only["count"] == 5 and only["hits"] == 5 and only["launched"] == 0
    assert later["misses"] == 0 and later["hits"] == 5
    assert later["launched"] == 6


def test_jobs_run_once_where_kernels_are_interpreted_and_twice_else(device: torch.device) -> None:
    ran: list[int] = []
    compile_all([lambda: ran.append(1), lambda: ran.append(2)], 2)
    assert ran == ([1, 2] if device.type == "cpu" else [1, 2, 1, 2])
