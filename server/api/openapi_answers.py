"""JSON Schemas of what the server answers, for the OpenAPI document. Whoever changes an answer changes it here."""

from __future__ import annotations

from typing import Any

from server.routing.replay.comparison import VERDICTS
from server.routing.replay.sampling import KINDS

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
FINISH: Schema = {"enum": ["stop", "length"], "description": "`stop` is also the end-of-sequence token."}
TOKEN_IDS: Schema = {"type": "array", "items": COUNT, "description": "With `return_token_ids`."}


def ref(name: str) -> Schema:
    """A schema of the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema) -> Schema:
    """A list of these."""
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    """This or null."""
    return {"anyOf": [schema, NULL]}


def struct(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """An object that has exactly these members."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def answer_schemas() -> dict[str, Schema]:
    """By name, as the components hold them."""
    return {**_shared(), **_chat(), **_completion(), **_others(), **_admin()}


def _shared() -> dict[str, Schema]:
    rate = nullable({"type": "number", "minimum": 0, "maximum": 1})
    return {
        "Error": struct(
            error=struct(message=STRING, type=STRING, param=nullable(STRING), code=nullable(STRING)),
        ),
        "Usage": struct(
            prompt_tokens=COUNT,
            completion_tokens=COUNT,
            total_tokens=COUNT,
            prompt_tokens_details=struct(cached_tokens=COUNT),
            completion_tokens_details=struct(accepted_prediction_tokens=COUNT, rejected_prediction_tokens=COUNT),
        ),
        "DraftAnnotations": {
            **array(struct(text=STRING, accepted=BOOLEAN)),
            "description": "With `speculative.annotate`: the text in pieces, and which of them were accepted drafts.",
        },
        "Metrics": {
            **nullable(
                struct(
                    speculative_decoding=struct(
                        {"per_step_drafted": array(COUNT), "per_step_accepted": array(COUNT)},
                        num_spec_tokens=COUNT,
                        num_spec_steps=COUNT,
                        num_draft_tokens=COUNT,
                        num_accepted_draft_tokens=COUNT,
                        mean_acceptance_length=nullable({"type": "number", "minimum": 1}),
                        draft_acceptance_rate=rate,
                        acceptance_histogram=array(COUNT),
                    )
                )
            ),
            "description": "With `speculative.metrics`; null for several choices.",
        },
    }


def _head(kind: str) -> dict[str, Schema]:
    return {
        "id": STRING,
        "object": {"const": kind},
        "created": {**INTEGER, "description": "Seconds since 1970."},
        "model": STRING,
        "system_fingerprint": STRING,
    }


def _chat() -> dict[str, Schema]:
    extras = {"token_ids": TOKEN_IDS, "draft_annotations": ref("DraftAnnotations")}
    top = {"prompt_token_ids": TOKEN_IDS, "metrics": ref("Metrics")}
    logprobs = nullable(ref("ChatLogprobs"))
    token = {"token": STRING, "logprob": {**NUMBER, "maximum": 0.001}, "bytes": array({**COUNT, "maximum": 255})}
    message = struct(role={"const": "assistant"}, content=STRING, refusal=NULL)
    delta = struct({"role": {"const": "assistant"}, "content": STRING, "refusal": NULL})
    return {
        "ChatLogprobs": struct(
            content=array(struct(**token, top_logprobs=array(struct(**token)))),
            refusal=NULL,
        ),
        "ChatCompletion": struct(
            top,
            **_head("chat.completion"),
            choices=array(struct(extras, index=COUNT, message=message, logprobs=logprobs, finish_reason=FINISH)),
            usage=ref("Usage"),
        ),
        "ChatCompletionChunk": struct(
            {**top, "usage": nullable(ref("Usage"))},
            **_head("chat.completion.chunk"),
            choices=array(struct(extras, index=COUNT, delta=delta, logprobs=logprobs, finish_reason=nullable(FINISH))),
        ),
    }


def _completion() -> dict[str, Schema]:
    extras = {
        "token_ids": TOKEN_IDS,
        "prompt_token_ids": TOKEN_IDS,
        "draft_annotations": ref("DraftAnnotations"),
    }
    choice = {"index": COUNT, "text": STRING, "logprobs": nullable(ref("CompletionLogprobs"))}
    metrics = {"metrics": ref("Metrics")}
    first = "Null for the prompt's first token, before which there is nothing."
    return {
        "CompletionLogprobs": struct(
            tokens=array(STRING),
            token_logprobs={**array(nullable(NUMBER)), "description": first},
            top_logprobs=array(nullable({"type": "object", "additionalProperties": NUMBER})),
            text_offset={**array(COUNT), "description": "Characters into `text`, an echo included."},
        ),
        "Completion": struct(
            metrics,
            **_head("text_completion"),
            choices=array(struct(extras, **choice, finish_reason=FINISH)),
            usage=ref("Usage"),
        ),
        "CompletionChunk": struct(
            {**metrics, "usage": nullable(ref("Usage"))},
            **_head("text_completion"),
            choices=array(struct(extras, **choice, finish_reason=nullable(FINISH))),
        ),
    }


def _others() -> dict[str, Schema]:
    engine: dict[str, Any] = {
        "engine": {"type": ["object", "null"], "description": "What the engine says of itself."},
        "stats": {"type": "object", "description": "The engine's counters and gauges."},
        "speculation": struct(
            paused=BOOLEAN,
            since=nullable(COUNT),
            reason=nullable(STRING),
            predicted_speedup=nullable({"type": "number", "minimum": 0}),
            realised_speedup=nullable({"type": "number", "minimum": 0}),
        ),
        "num_engine_restarts": COUNT,
    }
    state = {"avg_spec_accept_length": nullable({"type": "number", "minimum": 1})}
    return {
        "Tokens": struct({"token_strs": array(STRING)}, count=COUNT, max_model_len=COUNT, tokens=array(COUNT)),
        "Text": struct(prompt=STRING),
        "Model": struct(
            id=STRING,
            object={"const": "model"},
            created=INTEGER,
            owned_by={"const": "outpace"},
            root=STRING,
            parent=NULL,
            max_model_len=nullable(COUNT),
        ),
        "Models": struct(object={"const": "list"}, data=array(ref("Model"))),
        "Stats": _stats(),
        "Experiments": struct(object={"const": "list"}, data=array({"type": "object"})),
        "Comparisons": _comparisons(),
        "Health": struct(status={"const": "ok"}),
        "Ready": struct(status={"const": "ready"}),
        "NotReady": struct(status={"enum": ["starting", "failed", "restarting", "draining"]}, reason=STRING),
        "Version": struct(version=STRING),
        "ServerInfo": struct(
            version=STRING,
            model=STRING,
            ready=BOOLEAN,
            config={"type": "object", "description": "The settings that the server runs with."},
            **engine,
            arms={
                "type": "object",
                "description": "The arms beside the control, whose engine is told of above.",
                "additionalProperties": struct(model=STRING, ready=BOOLEAN, reason=nullable(STRING), **engine),
            },
            process=struct(pid=COUNT, num_tasks=COUNT, num_fds=INTEGER),
            internal_states=array(struct(**state)),
        ),
    }


def _comparisons() -> Schema:
    """Of `/v1/shadow`."""
    counts = {"type": "object", "additionalProperties": COUNT}
    pair = struct(
        kind={"enum": list(KINDS)},
        of=STRING,
        arm=STRING,
        compared=COUNT,
        diverged=COUNT,
        alarms=COUNT,
        dropped=COUNT,
        verdicts=counts,
        dropped_by_reason=counts,
    )
    divergence = struct(
        kind={"enum": list(KINDS)},
        of=STRING,
        arm=STRING,
        request_id=STRING,
        at_s=NUMBER,
        verdict={"enum": list(VERDICTS)},
        reason=STRING,
        num_tokens=COUNT,
        num_prompt_tokens=COUNT,
        position=COUNT,
        token=nullable(COUNT),
        copy_token=nullable(COUNT),
        gap=nullable(NUMBER),
        kl=nullable(NUMBER),
        length_shift=nullable(INTEGER),
        tpot_ratio=nullable(NUMBER),
    )
    return struct(object={"const": "list"}, pairs=array(pair), data=array(divergence))


def _admin() -> dict[str, Schema]:
    limit = nullable(COUNT)
    key = struct(
        name=STRING,
        requests_per_minute=limit,
        tokens_per_minute=limit,
        best_priority=INTEGER,
        default_priority=INTEGER,
        speculation=BOOLEAN,
        used=struct(requests=COUNT, tokens=COUNT),
    )
    return {
        "Keys": struct(object={"const": "list"}, data=array(key)),
        "Reloaded": struct(status={"const": "reloaded"}),
        "Done": struct(status={"const": "done"}),
        "Weights": struct(weights={"type": "object", "additionalProperties": NUMBER}),
    }


def _stats() -> Schema:
    seconds = nullable({"type": "number", "minimum": 0})
    summary = struct(count=COUNT, mean_s=seconds, p50_s=seconds, p95_s=seconds, p99_s=seconds)
    latency = struct(ttft=summary, itl=summary, step_gap=summary, tpot=summary, e2e=summary, queue=summary)
    engine = {"ready": BOOLEAN, "model": nullable(STRING), "drafter": nullable(STRING), "num_restarts": COUNT}
    value = {"anyOf": [NUMBER, {"type": "object", "additionalProperties": NUMBER}]}
    arm = struct(
        engine,
        latency={"type": "object", "additionalProperties": latency, "description": "By window."},
        values={"type": "object", "additionalProperties": value, "description": "Counters and gauges of /metrics."},
    )
    return struct(
        object={"const": "stats"},
        relative_error=NUMBER,
        quantiles=array(NUMBER),
        windows={"type": "object", "additionalProperties": struct(span_s=INTEGER, slot_s=INTEGER)},
        arms={"type": "object", "additionalProperties": arm},
    )
