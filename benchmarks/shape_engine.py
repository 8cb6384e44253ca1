"""The engine's process for a model that is only a shape: `config.json` says which, the weights are drawn at random.

For `benchmarks/gpu_http.py`: `Supervisor(program=(this file,))`. `outpace serve` itself never serves random weights.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from server.engine import process


def main() -> int:
    from server.engine import build
    from server.models.random_weights import random_source

    build.build_engine = partial(build.build_engine, find=random_source)
    return process.main()


if __name__ == "__main__":
    sys.exit(main())
