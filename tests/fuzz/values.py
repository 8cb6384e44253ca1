"""JSON values as text, so that there can be some which no serialiser writes: NaN, lone surrogates, doubled keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

Value = Callable[[Random], str]

ODD_NUMBERS = [
    *("0", "-0", "-0.0", "1", "-1", "1.0", "1.5", "-1.5", "2.1", "0.1", "1e-320", "1e308", "-1e308", "1e999", "1e-999"),
    *("127", "128", "129", "255", "256", "257", "288", "287", "16", "17", "21", "101", "-101", "65536", "1E2"),
    *("2147483647", "2147483648", "-2147483649", "4294967296", "9007199254740993", "9223372036854775807"),
    *("9223372036854775808", "-9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" + "0" * 400),
    *("1." + "0" * 500 + "1", "NaN", "Infinity", "-Infinity", "00", "+1", ".5", "1.", "0x10", "1_000", "1e", "--1"),
]
ODD_STRINGS = [
    *('""', '" "', '"a"', '"1"', '"true"', '"null"', '"none"', '"auto"', '"text"', '"\\u0000"', '"a\\u0000b"'),
    *('"\\ud800"', '"\\udc00x"', '"\\ud83d\\ude00"', '"\\ude00\\ud83d"', '"\\uFFFF"', '"\\ufeff"', '"\\u202e"'),
    *('"\N{GRINNING FACE}"', '"\N{COMBINING ACUTE ACCENT}"', '"e\N{COMBINING ACUTE ACCENT}\N{COMBINING TILDE}"'),
    *('"</s>"', '"<s>"', '"<s>assistant: "', '"{{ 7*7 }}"', '"{% for x in y %}"', '"\\r\\ndata: [DONE]\\r\\n\\r\\n"'),
    *('"\\x41"', '"\\u12"', '"unterminated', '"tab\there"', "'single'", '"\\"', '"%s%n"', '"' + "a" * 5000 + '"'),
]
ODD_OTHERS = [
    *("null", "true", "false", "[]", "{}", "[null]", "[[]]", "[{}]", '{"":{}}', '{"a":1,"a":2}', "[1,2,3]", "[-1]"),
    *('["a"]', '["a",1]', '[""]', '["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"]', "[288]"),
    *('{"type":"text"}', '{"type":"json_object"}', '{"type":"content","content":"x"}', '{"__proto__":{"x":1}}'),
    *("True", "None", "undefined", "[1,]", '{"a":1,}', "[", "{", "]", "//", "/* */1", ""),
]


def text(value: object) -> str:
    """Any value that JSON has."""
    return json.dumps(value, ensure_ascii=False)


def odd(rng: Random) -> str:
    """Something that belongs nowhere, or nearly fits."""
    pool = rng.choice([ODD_NUMBERS, ODD_STRINGS, ODD_OTHERS, None])
    return anything(rng) if pool is None else rng.choice(pool)


def anything(rng: Random, depth: int = 0) -> str:
    """A random tree; once in a while a very deep or a very wide one."""
    if depth == 0 and rng.random() < 0.08:
        levels = rng.choice([10, 100, 600, 5000, 60000])
        return "[" * levels + "]" * levels if rng.random() < 0.5 else '{"a":' * levels + "1" + "}" * levels
    if depth == 0 and rng.random() < 0.03:
        return "[" + ",".join(["1"] * rng.choice([1000, 20000])) + "]"
    kind = rng.randrange(4 if depth < 4 else 2)
    if kind == 0:
        return rng.choice(ODD_NUMBERS[:40])
    if kind == 1:
        return text(words(rng))
    items = [anything(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 2:
        return "[" + ",".join(items) + "]"
    return "{" + ",".join(f"{text(words(rng, 1))}:{item}" for item in items) + "}"


def words(rng: Random, most: int = 6) -> str:
    """A text of a few words, in several scripts."""
    known = [
        "the",
        "and",
        "ring",
        "on",
        "2+2=",
        "\n",
        "naïve",
        "日本語",
        "🙂",
        "\t",
        "Ωμέγα",
        "\u200d",
        "</s>",
        "ab" * 9,
    ]
    return " ".join(rng.choice(known) for _ in range(rng.randint(1, most)))
