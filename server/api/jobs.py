"""From a request's options to the job that answers it."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.access.auth import Caller
from server.api.echo import Echo
from server.api.formats import Format, Wording
from server.api.options import Defaults, Options
from server.api.respond import Job
from server.api.state import ServerState
from server.core import Request


def defaults_for(caller: Caller, state: ServerState) -> Defaults:
    """What holds where this caller's request says nothing."""
    return Defaults(state.config.request_timeout_s, state.config.spec_metrics, caller.speculation)


def wording_of(options: Options, prompt_ids: Sequence[Sequence[int]], echoes: Sequence[Echo] = ()) -> Wording:
    """What the answer holds beside the text."""
    return Wording(
        logprobs=options.logprobs is not None,
        usage_in_chunks=options.include_usage,
        token_ids=options.return_token_ids,
        n=options.n,
        prompt_ids=prompt_ids,
        echoes=echoes,
    )


def job_of(
    request_id: str,
    requests: list[Request],
    options: Options,
    style: Format,
    arrival: float,
    echoes: Sequence[Echo] = (),
) -> Job:
    """`requests` are those of `engine_requests` for the same options."""
    return Job(
        request_id=request_id,
        requests=requests,
        n=options.best_of,
        stop=options.stop,
        format=style,
        stream=options.stream,
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage,
        arrival=arrival,
        timeout_s=options.timeout_s,
        skip_special_tokens=options.skip_special_tokens,
        annotate=options.annotate,
        spec_metrics=options.spec_metrics,
        discard=options.discard,
        num_returned=options.n if options.best_of > options.n else None,
        echoes=echoes,
    )
