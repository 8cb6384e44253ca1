"""outpace.toml: options by name, arms that inherit, mistakes that are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from server.cli_options import OneLineParser, add_options, parse_config
from server.config import (
    CONTROL,
    ArmConfig,
    ConfigError,
    EngineConfig,
    RoutingConfig,
    ServerConfig,
    ShadowConfig,
    with_arms,
)
from server.routing.plan import plan_of

FILE = """
model = "org/model"
port = 9000
max-num-seqs = 4
drain_timeout_s = 2

[routing]
salt = "spring"
key = ["header:X-Team", "request"]

[[arms]]
name = "plain"
weight = 5
drafter = "none"

[[arms]]
name = "big"
model = "org/big"
weight = 2.5
"""


def parse(tmp_path: Path, content: str, *arguments: str) -> ServerConfig:
    path = tmp_path / "outpace.toml"
    path.write_text(content)
    parser = OneLineParser(prog="outpace serve")
    add_options(parser)
    return parse_config(parser.parse_args(["--config", str(path), *arguments]))


def test_a_file(tmp_path: Path) -> None:
    shared = EngineConfig(model="org/model", max_num_seqs=4)
    assert parse(tmp_path, FILE) == ServerConfig(
        engine=shared,
        arms=(
            ArmConfig("plain", EngineConfig(model="org/model", max_num_seqs=4, drafter="none"), 5.0),
            ArmConfig("big", EngineConfig(model="org/big", max_num_seqs=4), 2.5),
        ),
        routing=RoutingConfig("spring", ("header:X-Team", "request")),
        port=9000,
        drain_timeout_s=2.0,
    )


def test_an_arm_may_name_a_recipe_and_a_share_of_the_device(tmp_path: Path) -> None:
    (arm,) = parse(tmp_path, '[[arms]]\nname = "a"\nrecipe = "fp8"\ndevice-share = 0.25\n').arms
    assert arm == ArmConfig("a", EngineConfig(device_share=0.25), recipe="fp8")
    with pytest.raises(ConfigError, match=r"arms\[1\]\.device_share: 1\.5 is not valid; use more than 0, at most 1"):
        parse(tmp_path, '[[arms]]\nname = "a"\ndevice_share = 1.5\n')


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert parse(tmp_path, "") == ServerConfig()


def test_the_command_line_wins_but_not_over_what_an_arm_says(tmp_path: Path) -> None:
    config = parse(tmp_path, FILE, "--port", "1", "--drafter", "suffix", "--max-num-seqs", "2", "other")
    assert (config.port, config.engine.drafter, config.engine.model) == (1, "suffix", "other")
    plain, big = (arm.engine for arm in config.arms)
    assert (plain.drafter, plain.max_num_seqs, plain.model) == ("none", 2, "other")
    assert (big.drafter, big.model) == ("suffix", "org/big")


def test_the_control_has_the_rest(tmp_path: Path) -> None:
    arms = parse(tmp_path, FILE).all_arms
    assert [(arm.name, arm.weight) for arm in arms] == [(CONTROL, 92.5), ("plain", 5.0), ("big", 2.5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("port = 'x'", "outpace.toml: port: 'x' is not valid; use a whole number"),
        ("port = true", "outpace.toml: port: True is not valid; use a whole number"),
        ("adaptive = 1", "outpace.toml: adaptive: 1 is not valid; use true or false"),
        ("colour = 1", "outpace.toml: colour: there is no such setting; valid ones are access_log, "),
        ("engine = {}", "outpace.toml: engine: there is no such setting"),
        ("drafter = 'magic'", "drafter: 'magic' is not valid; use one of auto, "),
        ("port =", "cannot be read as TOML: "),
        ("arms = 3", "outpace.toml: arms: not valid; use [[arms]] tables"),
        ("[[arms]]\nweight = 3", "outpace.toml: arms[1].name: missing"),
        ("[[arms]]\nname = 'a b'", "arms[1].name: 'a b' is not valid; use up to 64 letters"),
        ("[[arms]]\nname = 'a'\nweight = 101", "arms[1].weight: 101.0 is not valid; use 0 to 100"),
        ("[[arms]]\nname = 'a'\nport = 1", "arms[1].port: there is no such setting; valid ones are "),
        ("[[arms]]\nname = 'a'\ndrafter = 'x'", "arms[1].drafter: 'x' is not valid"),
        ("[[arms]]\nname = 'a'\n[[arms]]\nname = 'a'", "arms: two are called 'a'"),
        ("[[arms]]\nname = 'control'", "arms: two are called 'control'"),
        ("[[arms]]\nname = 'a'\nweight = 60\n[[arms]]\nname = 'b'\nweight = 60", "arms: their weights are 120 percent"),
        ("[routing]\nkey = 'user'", "routing.key: 'user' is not valid; use a list"),
        (
            "[routing]\nkey = ['name']",
            "routing.key: 'name' is not valid; use any of user, api_key, request, header:NAME",
        ),
        ("[routing]\npepper = ''", "routing.pepper: there is no such setting; valid ones are key, salt"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    parser = OneLineParser(prog="outpace serve")
    add_options(parser)
    with pytest.raises(ConfigError, match=r"config: .* cannot be read as TOML"):
        parse_config(parser.parse_args(["--config", str(tmp_path / "none.toml")]))


EXPERIMENT = """
[[arms]]
name = "fast"
drafter = "none"
[experiment]
name = "spring"
candidate = "fast"
goal = "no_worse"
stages = [{share = 10, min_samples = 5}, {share = 50, min_time_s = 1}, {share = 100, min_samples = 0}]
[experiment.guards]
window_s = 30
[experiment.tolerances]
ttft = 0.1
"""


def test_an_experiment_brings_its_baseline(tmp_path: Path) -> None:
    config = parse(tmp_path, EXPERIMENT, "--max-num-seqs", "2")
    shared = EngineConfig(max_num_seqs=2)
    assert config.arms == (ArmConfig("fast", replace(shared, drafter="none")), ArmConfig("baseline", shared))
    assert config.experiment is not None
    plan = plan_of(config.experiment)
    assert (plan.name, plan.candidate, plan.baseline, plan.goal) == ("spring", "fast", "baseline", "no_worse")
    assert [stage.share for stage in plan.stages] == [10, 50, 100]
    assert plan.guards.window_s == 30 and plan.tolerance("ttft") == 0.1 and plan.tolerance("itl") == 0.05


def test_the_baseline_has_the_candidates_share_of_the_machine(tmp_path: Path) -> None:
    text = EXPERIMENT.replace('drafter = "none"', 'drafter = "none"\nnum_threads = 2\nkv_cache_tokens = 512')
    candidate, baseline = parse(tmp_path, text, "--num-threads", "8").arms
    assert (
        baseline.engine == EngineConfig(num_threads=2, kv_cache_tokens=512) == replace(candidate.engine, drafter="auto")
    )
    own = text + '[[arms]]\nname = "baseline"\nnum_threads = 4\nkv_cache_tokens = 512\n'
    with pytest.raises(ConfigError, match="num_threads of 'fast' is 2 and of its baseline 'baseline' 4"):
        parse(tmp_path, own)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('candidate = "fast"', 'candidate = "slow"', "experiment.candidate: there is no arm 'slow'; use one of fast"),
        ('candidate = "fast"', "", "experiment.candidate: missing"),
        ('drafter = "none"', "weight = 3", "arms: 'fast' has a weight; an experiment's stages say who gets what"),
        ('"no_worse"', '"win"', "experiment.goal: 'win' is not valid; use one of improve, no_worse"),
        ("share = 10, min", "min", "experiment.stages[1].share: missing"),
        ("share = 10, min", "share = 0, min", "experiment.stages[1].share: 0 is not valid; use more than 0"),
        ("min_samples = 5", "samples = 5", "experiment.stages[1].samples: there is no such setting; valid ones are "),
        ("window_s = 30", "window_s = 'a'", "experiment.guards.window_s: 'a' is not valid; use a number"),
        ("ttft = 0.1", "tea = 0.1", "experiment.tolerances: 'tea' is no metric; use "),
        ('name = "spring"', 'alpha = 0.7\nname = "spring"', "experiment.alpha: 0.7 is not valid"),
        (
            'goal = "no_worse"',
            'goal = "no_worse"\ncontrol = "fast2"',
            "experiment.control: 'fast2' is not valid; use control",
        ),
    ],
)
def test_mistakes_of_experiments(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in EXPERIMENT
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, EXPERIMENT.replace(before, after))
    assert message in str(caught.value)


SHADOW = """
audit_share = 0.01
[[arms]]
name = "plain"
drafter = "none"
[shadow]
arm = "plain"
share = 0.2
"""


def test_a_shadow_and_an_audit(tmp_path: Path) -> None:
    config = parse(tmp_path, SHADOW)
    assert config.shadow == ShadowConfig("plain", CONTROL, 0.2)
    assert (config.audit_share, config.replay_tolerance) == (0.01, 0.5)
    assert parse(tmp_path, SHADOW, "--audit-share", "0.5").audit_share == 0.5
    assert parse(tmp_path, "port = 1").shadow is None


def test_a_shadow_ends_with_its_arm(tmp_path: Path) -> None:
    config = parse(tmp_path, SHADOW)
    assert with_arms(config, config.arms).shadow == config.shadow
    assert with_arms(config, (), port=1).shadow is None


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('arm = "plain"', 'arm = "odd"', "shadow.arm: there is no arm 'odd'; use one of control, plain"),
        ('arm = "plain"', 'arm = "control"', "shadow.arm: 'control' is the arm that is copied; use another"),
        ('arm = "plain"', "", "shadow.arm: missing; name the arm that runs the copies"),
        ("share = 0.2", 'of = "odd"', "shadow.of: there is no arm 'odd'; use one of control, plain"),
        ("share = 0.2", "share = 0", "shadow.share: 0.0 is not valid; use more than 0, at most 1"),
        ("share = 0.2", "share = 1.5", "shadow.share: 1.5 is not valid"),
        ("share = 0.2", 'share = "a"', "shadow.share: 'a' is not valid; use a number"),
        ("share = 0.2", "part = 0.2", "shadow.part: there is no such setting; valid ones are arm, of, share"),
        ("audit_share = 0.01", "audit_share = 2", "audit_share: 2.0 is not valid; use 0 to 1"),
        ("audit_share = 0.01", "replay_tolerance = -1", "replay_tolerance: -1.0 is too small; use 0 or more"),
    ],
)
def test_mistakes_of_shadows(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in SHADOW
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, SHADOW.replace(before, after))
    assert message in str(caught.value)
