"""`outpace chat` at a pseudo-terminal, before a scripted server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, endless, steps
from tests.chat.terminal import CTRL_C, CTRL_D, Terminal

Open = Callable[..., Terminal]


@pytest.fixture
def at_terminal(tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def start(*arguments: str, **variables: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments, **variables))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


async def ready(terminal: Terminal) -> None:
    await terminal.expect("Ctrl-D leaves")
    await terminal.expect("> ")


def prompt_of(live: Live, number: int) -> str:
    """The text of the prompt that request `number` came with: its first token begins a reply."""
    return bytes(token for token in live.engine.requests[number].prompt_ids if token < 256).decode()


async def test_a_conversation(serve: Serve, at_terminal: Open) -> None:
    live = await serve(FakeEngine(steps("Hello", " world")))
    terminal = at_terminal(
        live.url, "--system", "Be kind.", "--seed", "7", "--temperature", "0.5", "--max-tokens", "20"
    )
    await ready(terminal)
    terminal.type("Hi\n")
    await terminal.expect("Hello world")
    summary = await terminal.expect("> ")
    assert "12 tokens, " in summary
    assert re.search(r"first after \d+\.\d\d s", summary)
    assert "9 of 11 drafts accepted" in summary
    terminal.type("And you?\n")
    await terminal.expect("Hello world")
    await terminal.expect("> ")
    terminal.type(CTRL_D)
    assert await terminal.exit_status() == 0
    assert prompt_of(live, 1) == "system:Be kind.\nuser:Hi\nassistant:Hello world\nuser:And you?\n"
    request = live.engine.requests[0]
    assert (request.sampling.seed, request.sampling.temperature, request.max_tokens) == (7, 0.5, 20)


async def test_ctrl_c_stops_the_answer_and_cancels_it_then_leaves(serve: Serve, at_terminal: Open) -> None:
    live = await serve(FakeEngine(endless, step_s=0.02))
    terminal = at_terminal(live.url)
    await ready(terminal)
    terminal.type("Hi\n")
    await terminal.expect("xxxx")
    terminal.type(CTRL_C)
    await terminal.expect("stopped")
    await live.engine.until(lambda: not live.engine.active)
    live.engine.script = steps("Done")
    terminal.type("Go on\n")
    await terminal.expect("Done")
    await terminal.expect("> ")
    assert re.fullmatch(r"user:Hi\nassistant:x+\nuser:Go on\n", prompt_of(live, 1)), "what was said so far is kept"
    terminal.type(CTRL_C)
    assert await terminal.exit_status() == 0


async def test_commands(serve: Serve, at_terminal: Open) -> None:
    live = await serve()
    terminal = at_terminal(live.url)
    await ready(terminal)
    for line, answer in [
        ("/help", "Ctrl-C stops an answer"),
        ("/system Be brief.", "system message is set"),
        ("Hi", "Hello world"),
        ("/reset", "is forgotten"),
        ("Again", "Hello world"),
        ("/system", "no system message"),
        ("/reset", "is forgotten"),
        ("Bye", "Hello world"),
        ("/nothing", "/nothing is no command"),
    ]:
        terminal.type(line + "\n")
        await terminal.expect(answer)
        await terminal.expect("> ")
    terminal.type("/exit\n")
    assert await terminal.exit_status() == 0
    assert [prompt_of(live, i) for i in range(3)] == [
        "system:Be brief.\nuser:Hi\n",
        "system:Be brief.\nuser:Again\n",
        "user:Bye\n",
    ]


async def test_an_error_is_one_line_and_the_conversation_goes_on(serve: Serve, at_terminal: Open) -> None:
    live = await serve()
    terminal = at_terminal(live.url)
    await ready(terminal)
    terminal.type("This is forbidden\n")
    await terminal.expect("the server answers 400: ")
    await terminal.expect("> ")
    terminal.type("Hi\n")
    await terminal.expect("Hello world")
    assert prompt_of(live, 0) == "user:Hi\n", "a question without an answer is dropped"


async def test_accepted_drafts_are_green(serve: Serve, at_terminal: Open) -> None:
    live = await serve(FakeEngine(steps("Hey", "!")))  # all but the last token of a step were accepted drafts
    terminal = at_terminal(live.url, "--show-drafts")
    await ready(terminal)
    terminal.type("Hi\n")
    shown = await terminal.expect("drafts accepted")
    assert "\x1b[32mH\x1b[0m\x1b[32me\x1b[0my!" in shown


async def test_without_colours_nothing_is_coloured(serve: Serve, at_terminal: Open) -> None:
    live = await serve(FakeEngine(steps("Hey", "!")))
    terminal = at_terminal(live.url, "--colour-drafts", NO_COLOR="1")
    await ready(terminal)
    terminal.type("Hi\n")
    shown = await terminal.expect("drafts accepted")
    assert "Hey!" in shown
    assert "\x1b[3" not in shown
    assert "\x1b[2m" not in shown


async def test_the_model_cannot_send_escape_sequences(serve: Serve, at_terminal: Open) -> None:
    live = await serve(FakeEngine(steps("a\x1b]0;owned\x07b\n\tc")))
    terminal = at_terminal(live.url)
    await ready(terminal)
    terminal.type("Hi\n")
    shown = await terminal.expect("drafts accepted")
    assert "a�]0;owned�b" in shown


async def test_lines_of_an_earlier_chat_are_in_the_history(serve: Serve, at_terminal: Open, tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="this Python has no line editing")
    live = await serve()
    for keys in ("Remember me\n", "\x1b[A\n"):  # the second time: arrow up
        terminal = at_terminal(live.url)
        await ready(terminal)
        terminal.type(keys)
        await terminal.expect("drafts accepted")
        await terminal.expect("> ")
        terminal.type(CTRL_D)
        assert await terminal.exit_status() == 0
    assert prompt_of(live, 1) == "user:Remember me\n"
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0
