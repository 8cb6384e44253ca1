"""Multiple-choice and exact-match tasks of lm-eval (EleutherAI's evaluation harness), answered by our engine.

Continuations are scored by the log-probabilities that the engine gives prompt tokens, answers are written by it, so
what is judged is what is served. Data comes from where the task says: the hub, or files of one's own.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from optimize.evaluate.errors import EvaluateError
from optimize.evaluate.options import EvaluateOptions
from optimize.evaluate.sides import Side
from server.core import Request, SamplingParams, StepOutput
from server.engine.core import EngineCore
from server.text.tokenizer import Tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise EvaluateError(f"tasks: need lm-eval (pip install outpace[evaluate]): {error}") from error

DEFAULT_ANSWER_TOKENS = 256
Scores = dict[str, dict[str, tuple[float, float]]]
_ids = itertools.count()


def run_tasks(
    options: EvaluateOptions, sides: tuple[Side, Side], tokenizer: Tokenizer, say: Callable[[str], None]
) -> Scores:
    """Base's and candidate's score by task and metric. Raises EvaluateError where lm-eval cannot run a task."""
    found = []
    for side in sides:
        say(f"tasks: {', '.join(options.tasks)} on {side.source.name}")
        found.append(scores(EngineLM(side.bench.core, tokenizer), options))
    base, candidate = found
    return {
        task: {metric: (value, candidate[task][metric]) for metric, value in metrics.items()}
        for task, metrics in base.items()
    }


def scores(model: EngineLM, options: EvaluateOptions) -> dict[str, dict[str, float]]:
    """By task and metric; standard errors are left out. Raises EvaluateError."""
    manager = TaskManager(include_path=None if options.task_dir is None else str(options.task_dir))
    unknown = [task for task in options.tasks if task not in manager.all_tasks]
    if unknown:
        raise EvaluateError(f"tasks: lm-eval knows no {unknown[0]!r}; --task-dir names a directory of further tasks")
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(options.tasks),
            task_manager=manager,
            limit=options.task_limit,
            bootstrap_iters=0,
            log_samples=False,
            verbosity=None,
        )
    except (OSError, ValueError, KeyError) as error:  # data that cannot be fetched or read
        raise EvaluateError(f"tasks: lm-eval cannot run them: {error}") from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, numbers.Real) and "_stderr" not in name and "," in name
        }
        for task, metrics in results["results"].items()
    }


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """An engine as a model of lm-eval."""

    def __init__(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._core, self._tokenizer = core, tokenizer
        limits = core.scheduler.limits
        self._rows, self._context = limits.max_num_seqs, min(limits.max_model_len, limits.kv_tokens)

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without context."""
        ends = self._tokenizer.eos_token_ids
        return ends[0] if ends else 0

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's cache of requests."""
        return "outpace"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids."""
        return self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is what greedy decoding writes) of each."""
        found = []
        for part in _parts(requests, self._rows):
            prompts = [self._fitted(context, continuation) for _, context, continuation in part]
            scored = self._run([Request(_name(), ids, _GREEDY, max_tokens=1, prompt_logprobs=1) for ids in prompts])
            for (_, _, continuation), outputs in zip(part, scored, strict=True):
                told = next(output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None)
                entries = told[len(told) - len(continuation) :]
                likely = all(entry.top_ids[:1] == [entry.token_id] for entry in entries)
                found.append((sum(entry.logprob for entry in entries), likely))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token after as much as the context holds of what stands before it."""
        found = []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            room = self._context - 2
            parts = [(("", ""), ids[max(0, at - 1) : at], ids[at : at + room]) for at in range(1, len(ids), room)]
            found.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to one of the strings `until`."""
        found = []
        for part in _parts(requests, self._rows):
            made = []
            for request in part:
                context, how = request.args
                room = self._context - 1
                length = min(int(how.get("max_gen_toks", DEFAULT_ANSWER_TOKENS)), room)
                ids = self.tok_encode(context, add_special_tokens=True)[-(room - length) or None :]
                made.append(Request(_name(), ids or [self.eot_token_id], _GREEDY, max_tokens=length))
            for request, outputs in zip(part, self._run(made), strict=True):
                text = self._tokenizer.decode([token for output in outputs for token in output.token_ids])
                found.append(_until(text, request.args[1].get("until", [])))
        return found

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """The end of both; one token is left for the engine to write. Raises EvaluateError for long continuations."""
        room = self._context - 1
        if len(continuation) >= room:
            raise EvaluateError(f"tasks: a continuation of {len(continuation)} tokens does not fit {room}")
        return [*context, *continuation][-room:]

    def _run(self, requests: Sequence[Request]) -> list[list[StepOutput]]:
        outputs: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
        for request in requests:
            refused = self._core.submit(request)
            if refused is not None:
                raise EvaluateError(f"tasks: a request of {len(request.prompt_ids)} tokens is refused: {refused.error}")
        while self._core.has_work:
            for output in self._core.step():
                if output.error is not None:
                    raise EvaluateError(f"tasks: a request failed: {output.error}")
                outputs[output.request_id].append(output)
        return list(outputs.values())


_GREEDY = SamplingParams(temperature=0.0)


def _name() -> str:
    return f"task-{next(_ids)}"


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _until(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
