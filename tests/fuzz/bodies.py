"""Bodies of every route: valid ones, and valid ones with something wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.fuzz.message import garbled
from tests.fuzz.values import Value, anything, odd, text, words

VOCAB_SIZE = 288
MAX_MODEL_LEN = 128
CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"


def one_of(*values: object) -> Value:
    return lambda rng: text(rng.choice(values))


def uniform(low: float, high: float) -> Value:
    return lambda rng: text(rng.choice([low, high, round(rng.uniform(low, high), 3)]))


def integer(low: int, high: int) -> Value:
    return lambda rng: text(rng.choice([low, high, rng.randint(low, high)]))


def _ids(rng: Random, most: int = 12) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, most))]


def _logit_bias(rng: Random) -> str:
    return text({str(rng.randrange(VOCAB_SIZE)): rng.choice([-100, 100, 0, 1.5]) for _ in range(rng.randint(0, 4))})


def _stop(rng: Random) -> str:
    stops = [rng.choice(["a", "\n", "the ", "\ufffd", "é", "x" * 40]) for _ in range(rng.randint(1, 4))]
    return text(stops[0] if rng.random() < 0.4 else stops)


def _content(rng: Random) -> object:
    said = words(rng) * rng.choice([1, 1, 1, 1, 1, 20, 400])
    return said if rng.random() < 0.8 else [{"type": "text", "text": said}] * rng.randint(1, 3)


def _messages(rng: Random) -> str:
    """A conversation, sometimes with a message that has something odd in it."""
    turns = []
    for _ in range(rng.choice([1, 1, 1, 2, 3, 9])):
        fields = {
            "role": text(rng.choice(["user", "assistant", "system", "developer"])),
            "content": text(_content(rng)),
        }
        if rng.random() < 0.06:
            fields[rng.choice(["role", "content", "name", "refusal", "tool_calls", "audio", "x"])] = odd(rng)
        turns.append(_object(list(fields.items())))
    return "[" + ",".join(turns) + "]"


def _prompt(rng: Random) -> str:
    kind = rng.randrange(6)
    if kind < 3:
        return text(words(rng) * rng.choice([1, 1, 1, 1, 30]))
    if kind == 3:
        return text([words(rng) for _ in range(rng.randint(1, 3))])
    if kind == 4:
        ids = _ids(rng, rng.choice([12, 12, MAX_MODEL_LEN, 2 * MAX_MODEL_LEN]))
        return text(ids if rng.random() < 0.8 else [*ids, rng.choice([-1, VOCAB_SIZE, 2**31, 2**63, 2**64, 1.5, True])])
    return text([_ids(rng) for _ in range(rng.randint(1, 3))])


def _nested(**fields: Value) -> Value:
    """An object of which some fields are there."""

    def make(rng: Random) -> str:
        pairs = [(name, value(rng)) for name, value in fields.items() if rng.random() < 0.7]
        if rng.random() < 0.1:
            pairs.append((rng.choice([*fields, "x"]), odd(rng)))
        return _object(pairs)

    return make


BOOLEAN = one_of(True, False)
COMMON: dict[str, Value] = {
    "model": one_of("tiny", None),
    "temperature": uniform(0, 2),
    "top_p": uniform(0.01, 1),
    "top_k": integer(-1, 300),
    "min_p": uniform(0, 1),
    "presence_penalty": uniform(-2, 2),
    "frequency_penalty": uniform(-2, 2),
    "repetition_penalty": uniform(0.01, 100),
    "logit_bias": _logit_bias,
    "seed": integer(-(2**63), 2**63 - 1),
    "n": one_of(1, 1, 1, 2, 3, 16),
    "max_tokens": integer(1, 8),
    "min_tokens": integer(0, 3),
    "stop": _stop,
    "stop_token_ids": lambda rng: text(_ids(rng)),
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "return_token_ids": BOOLEAN,
    "stream": BOOLEAN,
    "stream_options": _nested(include_usage=BOOLEAN, include_obfuscation=BOOLEAN),
    "speculative": _nested(
        enabled=BOOLEAN,
        max_draft_tokens=integer(0, 9),
        metrics=one_of("none", "summary", "detailed"),
        annotate=BOOLEAN,
    ),
    "priority": integer(-(2**31), 2**31 - 1),
    "timeout": one_of(0.001, 0.05, 1, 30, 1e9),
    "user": lambda rng: text(words(rng)),
    "metadata": lambda rng: text({words(rng, 1): words(rng)}),
    "store": BOOLEAN,
    "service_tier": one_of("auto", "default", "flex"),
    "safety_identifier": one_of("a"),
    "prompt_cache_key": one_of("a"),
    "prompt_cache_retention": one_of("24h", "in_memory"),
    "prompt_cache_options": one_of({}),
}
CHAT_ONLY: dict[str, Value] = {
    "messages": _messages,
    "max_completion_tokens": integer(1, 8),
    "logprobs": BOOLEAN,
    "top_logprobs": integer(0, 20),
    "prediction": _nested(type=one_of("content"), content=lambda rng: text(_content(rng))),
    "response_format": one_of({"type": "text"}, {"type": "text"}, None, {"type": "json_object"}),
    "modalities": one_of(["text"], ["text"], ["text", "audio"]),
    "tools": one_of([], [], None, [{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": one_of("none", "auto", "required", None),
    "parallel_tool_calls": BOOLEAN,
    "function_call": one_of("none", "auto", {"name": "f"}),
    "reasoning_effort": one_of("none", "low", None),
    "verbosity": one_of("medium", "low", None),
}
REFUSED = ("functions", "audio", "web_search_options", "moderation", "thinking", "input")
COMPLETIONS_ONLY: dict[str, Value] = {
    "prompt": _prompt,
    "logprobs": integer(0, 20),
    "echo": BOOLEAN,
    "best_of": one_of(1, 2, 16),
    "suffix": one_of("", None, "x"),
}


@dataclass(frozen=True, slots=True)
class Route:
    """`always` are in every body before it is broken, `often` in about half, the rest of `fields` now and then."""

    path: str
    fields: dict[str, Value]
    always: tuple[str, ...]
    often: tuple[str, ...] = ()


ROUTES = [
    Route(CHAT, COMMON | CHAT_ONLY, ("messages", "max_tokens"), ("stream", "seed", "temperature")),
    Route(COMPLETIONS, COMMON | COMPLETIONS_ONLY, ("prompt", "max_tokens"), ("stream", "seed", "temperature")),
    Route(
        TOKENIZE,
        {
            "model": one_of("tiny", None),
            "prompt": lambda rng: text(words(rng)),
            "messages": _messages,
            **dict.fromkeys(("add_special_tokens", "add_generation_prompt", "return_token_strs"), BOOLEAN),
        },
        ("prompt",),
    ),
    Route(DETOKENIZE, {"model": one_of("tiny", None), "tokens": lambda rng: text(_ids(rng))}, ("tokens",)),
]
WEIGHTS = [45, 38, 9, 8]

NEEDS = {"stream_options": "stream", "top_logprobs": "logprobs"}
Pairs = list[tuple[str, str]]


def _object(pairs: Pairs) -> str:
    return "{" + ",".join(f"{text(name)}:{value}" for name, value in pairs) + "}"


def valid_pairs(rng: Random, route: Route) -> Pairs:
    """Fields that are each valid; together they may still contradict each other."""
    share = rng.choice([0.0, 0.0, 0.05, 0.2])
    names = [*route.always, *(name for name in route.often if rng.random() < 0.5)]
    names += [name for name in route.fields if name not in names and rng.random() < share]
    for name, needed in NEEDS.items():
        if name in names and needed not in names and rng.random() < 0.8:
            names.append(needed)
    return [(name, route.fields[name](rng)) for name in names]


def _replace(rng: Random, route: Route, pairs: Pairs) -> None:
    name = rng.choice([*route.fields, *REFUSED])
    pairs[:] = [pair for pair in pairs if pair[0] != name] + [(name, odd(rng))]


def _add_unknown(rng: Random, route: Route, pairs: Pairs) -> None:
    name = rng.choice(["", "x", "temperatur", "Stream", "__class__", "\0", "é", "a" * 3000, "messages[0]", words(rng)])
    pairs.insert(rng.randint(0, len(pairs)), (name, odd(rng)))


def _remove(rng: Random, route: Route, pairs: Pairs) -> None:
    if pairs:
        del pairs[rng.randrange(len(pairs))]


def _double(rng: Random, route: Route, pairs: Pairs) -> None:
    name = rng.choice(pairs)[0] if pairs else "model"
    pairs.append((name, route.fields[name](rng) if name in route.fields else odd(rng)))


BREAK: list[Callable[[Random, Route, Pairs], None]] = [_replace, _replace, _replace, _add_unknown, _remove, _double]


def body(rng: Random) -> tuple[str, bytes]:
    """A route's path and a body for it: half of them whole, the others broken in one to three places."""
    route = rng.choices(ROUTES, WEIGHTS)[0]
    pairs = valid_pairs(rng, route)
    for _ in range(rng.choice([0, 0, 0, 0, 1, 1, 2, 3])):
        rng.choice(BREAK)(rng, route, pairs)
    data = _object(pairs).encode("utf-8", "surrogatepass")
    chance = rng.random()
    if chance < 0.06:
        data = garbled(rng, data)
    elif chance < 0.09:
        data = data[: rng.randint(0, len(data))]
    elif chance < 0.13:
        data = rng.choice(
            [b"\xef\xbb\xbf" + data, data + b"\0", data + data, b" \n\t" * 500 + data, b"", b"[]", b"null"]
        )
    elif chance < 0.14:
        data = anything(rng).encode("utf-8", "surrogatepass")
    elif chance < 0.15:
        data = data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "utf-16-le"]))
    return route.path, data


def simple(rng: Random, *, stream: bool, max_tokens: int = 4) -> tuple[str, bytes]:
    """A request that is certainly valid, for cases that break something else."""
    route = rng.choice(ROUTES[:2])
    pairs = [(name, route.fields[name](rng)) for name in ("seed", "temperature")]
    subject = ("messages", '[{"role":"user","content":"Hi"}]') if route.path == CHAT else ("prompt", '"Hi"')
    pairs += [subject, ("stream", text(stream)), ("max_tokens", text(max_tokens)), ("ignore_eos", "true")]
    return route.path, _object(pairs).encode()
