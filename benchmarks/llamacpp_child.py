"""llama.cpp in a process of its own, for `vs_llamacpp.py`: imports nothing of this repository.

    python benchmarks/llamacpp_child.py MODEL.gguf THREADS

Reads lines {"prompt": [ids], "new": n}; answers {"prompt_s": …, "decode_s": …, "tokens": [ids]}: greedy, the first of
`new` tokens from the prompt, each of the others from a step of one token.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    model = llama_cpp.Llama(
        path, n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
    )

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        model.reset()
        started = time.perf_counter()
        model.eval(asked["prompt"])
        tokens = [best()]
        first = time.perf_counter()
        while len(tokens) < asked["new"]:
            model.eval(tokens[-1:])
            tokens.append(best())
        done = time.perf_counter()
        print(json.dumps({"prompt_s": first - started, "decode_s": done - first, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
