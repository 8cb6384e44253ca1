"""`echo` and `best_of` of text completions."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from server.core import FinishReason, Request, StepOutput, TokenLogprobs
from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine, Script, steps

ECHO_LOGPROBS = {
    "tokens": ["H", "i", "a", "b"],
    "token_logprobs": [None, -1.0, -0.5, -0.5],
    "top_logprobs": [None, {"i": -1.0}, {"a": -0.5}, {"b": -0.5}],
    "text_offset": [0, 1, 2, 3],
}


def _scored(*texts: str) -> Script:
    """The prompt's log-probabilities come with the first output, from the second token on."""

    def script(request: Request) -> list[StepOutput]:
        outputs = list(steps(*texts)(request))
        if request.prompt_logprobs is not None:
            scored = [TokenLogprobs(token, -1.0, [token], [-1.0]) for token in request.prompt_ids[1:]]
            outputs[0] = replace(outputs[0], prompt_logprobs=scored)
        return outputs

    return script


async def test_an_echo_comes_before_the_answer(serve: Serve) -> None:
    live = await serve(FakeEngine(_scored("!")))
    _, answer = await live.complete(prompt=["Hi", "Hé"], n=2, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["Hi!", "Hi!", "Hé!", "Hé!"]
    assert answer["choices"][0]["logprobs"] is None
    _, of_ids = await live.complete(prompt=[72, 256, 105], echo=True)
    assert of_ids["choices"][0]["text"] == "H<eos>i!", "tokens are spelled out"


async def test_an_echo_has_its_log_probabilities(serve: Serve) -> None:
    live = await serve(FakeEngine(_scored("a", "b")))
    _, answer = await live.complete(echo=True, logprobs=1, n=2)
    assert [choice["logprobs"] for choice in answer["choices"]] == [ECHO_LOGPROBS] * 2
    assert [request.prompt_logprobs for request in live.engine.requests] == [1, None]


async def test_a_streamed_echo_adds_up_to_the_whole(serve: Serve) -> None:
    live = await serve(FakeEngine(_scored("a", "b")))
    stream = await live.client.completions.create(model="fake", prompt="Hi", n=2, echo=True, logprobs=1, stream=True)
    texts = ["", ""]
    lists: list[dict[str, list[Any]]] = [{name: [] for name in ECHO_LOGPROBS} for _ in texts]
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        for name, values in lists[choice.index].items():
            values += getattr(choice.logprobs, name)
    assert texts == ["Hiab", "Hiab"]
    assert lists == [ECHO_LOGPROBS, ECHO_LOGPROBS]


async def test_an_echo_alone(serve: Serve) -> None:
    live = await serve(FakeEngine(_scored("a")))
    _, answer = await live.complete(echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["tokens"] == ["H", "i"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2, 0)
    assert live.engine.requests[0].max_tokens == 1, "the engine can not generate nothing"
    _, silence = await live.complete(max_tokens=0)
    assert silence["choices"][0]["text"] == ""


async def test_the_best_of_several(serve: Serve) -> None:
    def script(request: Request) -> list[StepOutput]:
        [output] = steps("abc"[request.choice], finish=FinishReason.LENGTH)(request)
        assert output.logprobs is not None
        logprob = [-2.0, -1.0, -3.0][request.choice]
        return [replace(output, logprobs=[replace(output.logprobs[0], logprob=logprob)])]

    live = await serve(FakeEngine(script))
    _, answer = await live.complete(prompt=["x", "y"], best_of=3, n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["b", "a", "b", "a"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["logprobs"] is None, "nobody asked to see them"
    assert answer["usage"]["completion_tokens"] == 6, "all were generated"
    _, echoed = await live.complete(prompt=["x", "y"], best_of=3, n=2, echo=True)
    assert [choice["text"] for choice in echoed["choices"]] == ["xb", "xa", "yb", "ya"]
    assert (await live.complete(best_of=3, stream=True))[0] == 400
