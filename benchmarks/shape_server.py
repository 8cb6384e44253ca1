"""`outpace serve` before an engine with random weights: `shape_server.py [options of outpace serve] --model DIRECTORY`.

`write_shape` makes the directory: a shape, a tokenizer whose every token is a short word, and nothing to load.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from server.api.event_loop import loop_factory
from server.api.lifecycle import Backend, Server
from server.api.load_text import load_text
from server.api.pool.owner import Pool
from server.cli_options import add_options, parse_config
from server.config import ServerConfig
from server.engine.client import EngineClient
from server.models.shapes import shape
from server.text.token_bytes import byte_level_alphabet

ENGINE = str(Path(__file__).with_name("shape_engine.py"))


def write_shape(directory: Path, name: str) -> Path:
    """What the HTTP side reads of a model with the named shape (`server.models.shapes`)."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    raw = shape(name)
    words = ("Ġ" + "".join(four) for four in itertools.product(string.ascii_lowercase, repeat=4))
    tokens = itertools.islice(itertools.chain(byte_level_alphabet(), words), raw["vocab_size"])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "config.json").write_text(json.dumps(raw))
    header = json.dumps({"nothing": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return directory


async def serve(config: ServerConfig) -> None:
    """Serves until a signal."""
    program = (ENGINE,)
    if config.api_workers > 1:
        await Pool(config, "benchmark", print, program).run()
        return
    engine = EngineClient(config.engine, program)
    backend = Backend(config.engine, engine, lambda: load_text(config.engine.model))
    await Server(config, [backend], "benchmark", print).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = parse_config(parser.parse_args())
    logging.basicConfig(level=config.log_level.upper())
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(config))


if __name__ == "__main__":
    main()
