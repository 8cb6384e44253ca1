"""The command as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server import cli


def plan(*arguments: str) -> int:
    return cli.main(["plan", *arguments])


GPU = ("--device", "cuda", "--device-memory")


def test_a_machine_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("llama-3.1-8b", *GPU, "80GiB") == 0
    out, err = capsys.readouterr()
    assert out.startswith("llama-3.1-8b (") and out.endswith("It fits.\n") and err == ""


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("llama-3.1-8b", *GPU, "80GiB", "--json", "--drafter", "eagle3") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["drafter"]["name"], found["device"]["type"]) == (True, "eagle3", "cuda")


@pytest.mark.parametrize("where", [("--device", "cpu"), (*GPU, "24GiB")])
def test_the_head_that_comes_with_the_embedded_model(
    where: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("smollm2-135m", "--drafter", "eagle3", *where) == 0
    assert "smollm2-135m-eagle3" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_what_does_not_fit_is_shown_and_exit_status_1(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("llama-3.1-8b", *GPU, "16GiB", *more) == 1
    out, err = capsys.readouterr()
    assert "1.71 GiB too much; lower max_num_seqs" in out and err == ""


def test_this_machine(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(str(tiny_llama_dir), "--device", "cpu") == 0
    assert "on this machine's CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nowhere"], 1, ["nowhere: there is no such file or directory", "llama-3.1-8b"]),
        (
            ["tiny", "--drafter", "eagle3", "--device", "cpu"],
            1,
            ["EAGLE-3 needs three layers to fuse; the target has 2"],
        ),
        (["tiny", "--kv-cache-dtype", "fp8", "--device", "cpu"], 2, ["kv_cache_dtype: 'fp8' is a setting for GPUs"]),
        (["tiny", "--max-model-len", "5000"], 2, ["max_model_len: 5000 is too large; tiny was trained for 4096"]),
        (["tiny", "--device", "cuda:99"], 2, ["device: 'cuda:99' is not there", "--device-memory"]),
        (["tiny", "--device", "tpu", "--device-memory", "1GiB"], 2, ["device: 'tpu' is not valid"]),
        (["tiny", "--drafter", "magic"], 2, ["drafter: 'magic' is not valid"]),
        (["tiny", "--drafter", "small-lm", "--draft-model", "llama-3.2-1b", *GPU, "9GiB"], 2, ["vocabulary of 128256"]),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], status: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("outpace plan: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_model_that_nobody_can_serve_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MysteryForCausalLM"], "model_type": "x"}))
    assert plan(str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("outpace plan: MysteryForCausalLM is not supported") and err.count("\n") == 1
