from __future__ import annotations

import argparse

import pytest

from server.chat.options import ChatOptions, OptionError, add_chat_options, parse_options, server_root


def parse(*arguments: str, **environment: str) -> ChatOptions:
    parser = argparse.ArgumentParser()
    add_chat_options(parser)
    return parse_options(parser.parse_args(arguments), environment)


def test_defaults_leave_everything_to_the_server() -> None:
    assert parse() == ChatOptions()
    assert parse().fields() == {}


def test_what_was_given_is_sent_zero_included() -> None:
    options = parse("--temperature", "0", "--max-tokens", "5", "--seed", "-1")
    assert options.fields() == {"temperature": 0.0, "max_tokens": 5, "seed": -1}


@pytest.mark.parametrize("name", ["--show-drafts", "--colour-drafts", "--color-drafts"])
def test_drafts_have_three_spellings(name: str) -> None:
    assert parse(name).show_drafts


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("https://a.example/v1", "https://a.example"),
        ("http://[::1]:1/", "http://[::1]:1"),
        ("http://a.example/proxy/v1/", "http://a.example/proxy"),
        ("http://a.example/?x=1#y", "http://a.example"),
    ],
)
def test_the_root_of_a_url(url: str, root: str) -> None:
    assert server_root(url) == root


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://", "http://a:x", "http://a:99999", "http://[::1", "a b", "http://ä"]
)
def test_a_wrong_url_says_what_is_valid(url: str) -> None:
    with pytest.raises(OptionError, match=r"^URL: .* is not valid; use http://HOST:PORT or https://HOST:PORT$"):
        server_root(url)


def test_a_key_that_no_header_can_carry() -> None:
    with pytest.raises(OptionError, match=r"^api_key: "):
        parse("--api-key", "a\nb")
