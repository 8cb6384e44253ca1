"""GGUF reading and conversion against files with known tensors, against transformers, and against damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from safetensors.numpy import load_file

from server.models.embedded import embedded_gguf
from server.models.errors import ModelSourceError
from server.models.gguf import GGML_TYPES, GgufFile, dequantize
from server.models.gguf_config import hf_config, llama3_factors
from server.models.gguf_convert import BlockSource, convert, load_blocks
from tests.models.gguf_files import HEAD_DIM, TOKENS, Array, Spec, Type, write_gguf

MIXED = {
    "attn_q": Type.Q8_0,
    "attn_k": Type.Q4_0,
    "attn_v": Type.F16,
    "attn_output": Type.Q4_1,
    "ffn_gate": Type.Q5_0,
    "ffn_up": Type.Q5_1,
    "ffn_down": Type.BF16,
    "token_embd": Type.Q8_0,
}
SPECS = {
    "llama": Spec(types=MIXED),
    "llama-biases": Spec(biases=("attn_q", "attn_k", "attn_v"), tied=False),
    "mistral": Spec("mistral", types={"attn_q": Type.Q4_0}, metadata={"mistral.attention.sliding_window": 64}),
    "qwen2": Spec("qwen2", types=MIXED, biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Spec("qwen3", types={"attn_q": Type.Q8_0}, norms=True, metadata={"qwen3.attention.key_length": HEAD_DIM}),
}


def converted(tmp_path: Path, spec: Spec) -> tuple[Path, Path, dict[str, Array]]:
    source, directory = tmp_path / "model.gguf", tmp_path / "hf"
    expected = write_gguf(source, spec)
    directory.mkdir()
    convert(GgufFile(source), directory)
    return source, directory, expected


def config_of(tmp_path: Path, spec: Spec) -> dict[str, Any]:
    write_gguf(tmp_path / "model.gguf", spec)
    return hf_config(GgufFile(tmp_path / "model.gguf"))


def test_block_sizes_are_ggmls() -> None:
    for type_id, (name, values, num_bytes) in GGML_TYPES.items():
        assert GGMLQuantizationType(type_id).name == name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(type_id)] == (values, num_bytes)


def test_metadata_and_tensors_equal_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    nested = {"x.floats": [1.5, -2.0], "x.bools": [True, False], "x.strings": ["é", ""], "x.flag": True}
    write_gguf(path, Spec(types=MIXED, metadata=nested))
    file, reference = GgufFile(path), GGUFReader(path)
    wanted = {key: value.contents() for key, value in reference.fields.items() if not key.startswith("GGUF.")}
    assert dict(file.metadata) == wanted
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        mine = file.tensors[tensor.name]
        assert mine.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert file.blocks(tensor.name).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("name", SPECS)
def test_converted_weights_are_the_originals(tmp_path: Path, name: str) -> None:
    _, directory, expected = converted(tmp_path, SPECS[name])
    weights = load_file(directory / "model.safetensors")
    for key, values in expected.items():
        np.testing.assert_array_equal(weights.pop(key), values, err_msg=key)
    assert all(key.endswith(".bias") and not values.any() for key, values in weights.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPECS)
def test_transformers_loads_the_directory(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    _, directory, expected = converted(tmp_path, SPECS[name])
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not set(report["missing_keys"]) - {"lm_head.weight"}
    state = model.state_dict()
    for key, values in expected.items():
        np.testing.assert_array_equal(state[key].numpy(), values, err_msg=key)
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.tie_word_embeddings is SPECS[name].tied
    assert model.generation_config.eos_token_id == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_weights_equal_transformers_own_reading_of_the_file(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    source, directory, _ = converted(tmp_path, SPECS[name])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name).state_dict()
    for key, values in load_file(directory / "model.safetensors").items():
        np.testing.assert_array_equal(reference[key].numpy(), values, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_raw_blocks_stay_reachable(tmp_path: Path, name: str) -> None:
    source, directory, expected = converted(tmp_path, SPECS[name])
    for key in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        raw = load_blocks(directory, key)
        assert raw is not None
        type_id = getattr(Type, raw.type_name)
        rows = raw.data if raw.row_order is None else raw.data[raw.row_order]
        np.testing.assert_array_equal(dequantize(rows, type_id), expected[key])
        assert raw.shape == expected[key].shape
        assert (raw.row_order is not None) == (name == "llama" and "q_proj" in key)
    assert load_blocks(directory, "lm_head.weight") is None
    assert sorted(BlockSource.open(directory).names()) == sorted(expected)
    source.write_bytes(b"GGUF")
    with pytest.raises(ModelSourceError, match="has changed"):
        load_blocks(directory, key)
    source.unlink()
    with pytest.raises(ModelSourceError, match="gone"):
        load_blocks(directory, key)
    (directory / "outpace.json").unlink()
    assert load_blocks(directory, key) is None


def test_record_and_progress(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source, Spec())
    (tmp_path / "hf").mkdir()
    seen: list[float] = []
    convert(GgufFile(source), tmp_path / "hf", progress=lambda what, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0
    record = json.loads((tmp_path / "hf" / "outpace.json").read_text())
    assert record["source"]["path"] == str(source)
    assert record["source"]["size"] == source.stat().st_size
    assert record["weights_size"] == (tmp_path / "hf" / "model.safetensors").stat().st_size


def test_large_tensors_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.models.gguf_write.VALUES_PER_CHUNK", 200)
    _, directory, expected = converted(tmp_path, SPECS["llama"])
    weights = load_file(directory / "model.safetensors")
    for key, values in expected.items():
        np.testing.assert_array_equal(weights[key], values, err_msg=key)


class TestConfig:
    def test_heads_and_sizes(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, Spec())
        assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)
        assert (config["vocab_size"], config["max_position_embeddings"]) == (len(TOKENS), 256)
        assert config["rope_scaling"] is None

    def test_a_window_makes_it_mistral(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, Spec(metadata={"llama.attention.sliding_window": 32}))
        assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)
        assert config_of(tmp_path, Spec("mistral"))["sliding_window"] is None

    @pytest.mark.parametrize("factor", [8.0, 32.0])
    def test_llama3_scaling_is_recovered(self, tmp_path: Path, factor: float) -> None:
        divisors = llama3_factors(500000.0, HEAD_DIM, factor, 8192).astype(np.float32)
        spec = Spec(metadata={"llama.rope.freq_base": 500000.0}, extra={"rope_freqs.weight": divisors})
        assert config_of(tmp_path, spec)["rope_scaling"] == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }

    @pytest.mark.filterwarnings("ignore")
    def test_llama3_divisors_are_transformers(self) -> None:
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling = {**scaling, "original_max_position_embeddings": 8192}
        config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_theta=500000.0, rope_scaling=scaling)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 1 / 500000.0 ** (np.arange(0, 128, 2) / 128)
        np.testing.assert_allclose(plain / llama3_factors(500000.0, 128, 8.0, 8192), scaled.numpy(), rtol=1e-5)

    def test_unscaled_and_unknown_divisors(self, tmp_path: Path) -> None:
        ones = np.ones(HEAD_DIM // 2, dtype=np.float32)
        assert config_of(tmp_path, Spec(extra={"rope_freqs.weight": ones}))["rope_scaling"] is None
        odd = np.arange(1, HEAD_DIM // 2 + 1, dtype=np.float32)
        with pytest.raises(ModelSourceError, match="follow no scaling rule"):
            config_of(tmp_path, Spec(extra={"rope_freqs.weight": odd}))

    def test_linear_and_yarn_scaling(self, tmp_path: Path) -> None:
        scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
        linear = config_of(tmp_path, Spec(metadata=scaled))["rope_scaling"]
        assert (linear["rope_type"], linear["factor"]) == ("linear", 2.0)
        yarn = config_of(tmp_path, Spec(metadata=scaled | {"llama.rope.scaling.type": "yarn"}))["rope_scaling"]
        assert (yarn["rope_type"], yarn["original_max_position_embeddings"]) == ("yarn", 128)
        with pytest.raises(ModelSourceError, match="longrope"):
            config_of(tmp_path, Spec(metadata=scaled | {"llama.rope.scaling.type": "longrope"}))

    def test_every_end_of_reply_is_kept(self, tmp_path: Path) -> None:
        _, directory, _ = converted(tmp_path, Spec(metadata={"tokenizer.ggml.eot_token_id": 0}))
        assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("gemma"), "architecture 'gemma' is not supported; GGUF files of llama, mistral, qwen2, qwen3 are"),
        (Spec(metadata={"llama.expert_count": 8}), "mixture-of-experts"),
        (Spec(metadata={"split.count": 3}), "one part of a split model"),
        (Spec(metadata={"llama.block_count": None}), r"llama\.block_count is missing"),
        (Spec(metadata={"llama.block_count": 3}), r"layers\.2\.self_attn\.q_proj\.weight is missing"),
        (Spec(metadata={"llama.attention.head_count_kv": [2, 4]}), "differs between layers"),
        (Spec(metadata={"llama.attention.head_count": 8}), "rotary width 16"),
        (Spec(metadata={"llama.feed_forward_length": 64}), r"gate_proj\.weight is \(96, 64\), should be \(64, 64\)"),
        (Spec(metadata={"tokenizer.ggml.tokens": None}), "no tokenizer in this file"),
        (Spec(metadata={"tokenizer.ggml.model": "bert"}), "tokenizer model 'bert' is not supported"),
        (Spec(metadata={"tokenizer.ggml.pre": "viking"}), "'viking' is not known; known: smollm"),
        (Spec(extra={"blk.0.odd.weight": np.ones(4, dtype=np.float32)}), r"'blk\.0\.odd\.weight' belongs to no"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, spec: Spec, message: str) -> None:
    with pytest.raises(ModelSourceError, match=message):
        converted(tmp_path, spec)


class TestDamage:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> bytes:
        write_gguf(tmp_path / "whole.gguf", Spec(types=MIXED))
        return (tmp_path / "whole.gguf").read_bytes()

    def read(self, tmp_path: Path, content: bytes) -> GgufFile:
        path = tmp_path / "damaged.gguf"
        path.write_bytes(content)
        return GgufFile(path)

    def test_wrong_magic(self, tmp_path: Path, whole: bytes) -> None:
        with pytest.raises(ModelSourceError, match="not a GGUF file"):
            self.read(tmp_path, b"GGML" + whole[4:])
        with pytest.raises(ModelSourceError, match="not a GGUF file"):
            self.read(tmp_path, b"")

    def test_other_versions(self, tmp_path: Path, whole: bytes) -> None:
        with pytest.raises(ModelSourceError, match="version 1 of GGUF"):
            self.read(tmp_path, whole[:4] + b"\1\0\0\0" + whole[8:])
        with pytest.raises(ModelSourceError, match="big-endian"):
            self.read(tmp_path, whole[:4] + b"\0\0\0\3" + whole[8:])

    def test_cut_off_anywhere(self, tmp_path: Path, whole: bytes) -> None:
        cuts = [*range(4, 6000, 97), *range(6000, len(whole), 9973), len(whole) - 64]
        for cut in cuts:
            with pytest.raises(ModelSourceError, match=r"damaged or incomplete"):
                self.read(tmp_path, whole[:cut])

    def test_absurd_counts(self, tmp_path: Path, whole: bytes) -> None:
        with pytest.raises(ModelSourceError, match="claims"):
            self.read(tmp_path, whole[:8] + b"\xff" * 8 + whole[16:])

    def test_flipped_header_bytes_give_clear_errors_or_a_file(self, tmp_path: Path, whole: bytes) -> None:
        rng = np.random.default_rng(0)
        messages: list[str] = []
        for at in rng.integers(4, 9000, 400):
            content = bytearray(whole)
            content[at] ^= 1 << int(rng.integers(8))
            try:
                self.read(tmp_path, bytes(content))
            except ModelSourceError as error:
                messages.append(str(error))
        assert len(messages) > 50
        assert all("damaged.gguf" in message for message in messages)


def test_the_embedded_file_is_read_quickly_and_fully() -> None:
    file = GgufFile(embedded_gguf())
    assert file.architecture == "llama"
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.blocks("blk.0.attn_q.weight").shape == (576, 576 // 32 * 20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_embedded_model_knows_the_capital_of_france(embedded_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from server.text.chat_template import ChatTemplate, encode_chat
    from server.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(embedded_model_dir)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    ids = encode_chat(tokenizer, template, [{"role": "user", "content": "What is the capital of France?"}])
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir)
    output = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    assert tokenizer.decode(output) == "The capital of France is Paris."
    assert output[-1] in tokenizer.eos_token_ids
