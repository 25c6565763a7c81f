"""The description of the bodies, from which clients and tests are made: fields that count, and those left out."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from plumbline.config.serving import Limits
from serve import responses
from serve.requests import IGNORED, NEUTRAL, ROLES, Kind

_NUMBER = {"type": "number"}
_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}


def _several(one: Mapping[str, Any], most: int, **more: Any) -> dict[str, Any]:
    return {"anyOf": [one, {"type": "array", "items": one, "maxItems": most, **more}]}


def _common() -> dict[str, Any]:
    return {
        "model": {**_TEXT, "maxLength": 128, "description": "a name of /v1/models, or a version: ple@12"},
        "temperature": {**_NUMBER, "minimum": 0, "maximum": 2},
        "top_p": {**_NUMBER, "exclusiveMinimum": 0, "maximum": 1},
        "stream": _FLAG,
        "user": {**_TEXT, "description": "means nothing here"},
    }


def _sampled(limits: Limits) -> dict[str, Any]:
    return {
        **_common(),
        "max_tokens": {"type": "integer", "minimum": 1},
        "n": {"type": "integer", "minimum": 1, "maximum": limits.n},
        "stop": _several(_TEXT, 4),
        "seed": {"type": "integer", "minimum": 0},
        "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}, "additionalProperties": False},
        "presence_penalty": {**_NUMBER, "minimum": -2, "maximum": 2},
        "frequency_penalty": {**_NUMBER, "minimum": -2, "maximum": 2},
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {**_NUMBER, "minimum": -100, "maximum": 100},
            "description": "by token id",
        },
        "top_k": {"type": "integer", "minimum": 0, "description": "not OpenAI's; 0: all tokens"},
        "min_p": {**_NUMBER, "minimum": 0, "maximum": 1, "description": "not OpenAI's"},
        "repetition_penalty": {**_NUMBER, "exclusiveMinimum": 0, "maximum": 2, "description": "not OpenAI's"},
    }


def _chat(limits: Limits) -> dict[str, Any]:
    return {
        **_sampled(limits),
        "messages": {"type": "array", "items": _turn(_TEXT), "minItems": 1, "maxItems": limits.messages},
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "chat_template_kwargs": {
            "type": "object",
            "additionalProperties": {"type": ["boolean", "number", "string"]},
            "description": "variables that the chat template reads, such as enable_thinking",
        },
        "logprobs": _FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    }


def _completion(limits: Limits) -> dict[str, Any]:
    return {
        **_sampled(limits),
        "prompt": _several({**_TEXT, "minLength": 1}, limits.messages, minItems=1),
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 5},
        "echo": _FLAG,
    }


def _response(limits: Limits) -> dict[str, Any]:
    part = {
        "type": "object",
        "properties": {"type": {**_TEXT, "enum": list(responses.PARTS)}, "text": _TEXT},
        "required": ["type", "text"],
    }
    turn = _turn(_several(part, limits.messages)["anyOf"][1])
    turns = {"type": "array", "items": turn, "minItems": 1, "maxItems": limits.messages}
    return {
        **_common(),
        "input": {"anyOf": [{**_TEXT, "minLength": 1}, turns]},
        "instructions": _TEXT,
        "max_output_tokens": {"type": "integer", "minimum": 1},
    }


def _turn(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"role": {**_TEXT, "enum": list(ROLES)}, "content": content},
        "required": ["role", "content"],
    }


def _left_out(ignored: Iterable[str], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Fields that are taken, and change nothing: whatever they hold, or only where they ask for no more than text."""
    any_value = {key: {"description": "taken, and left out"} for key in sorted(ignored)}
    return any_value | {
        key: {"enum": [*values, None], "description": "left out; another value is refused"}
        for key, values in neutral.items()
    }


def describe(kind: Kind | Literal["response"], limits: Limits) -> dict[str, Any]:
    """What FastAPI adds to the description of a route whose body it does not parse itself."""
    if kind == "response":
        properties = _response(limits) | _left_out(responses.IGNORED, responses.NEUTRAL)
    else:
        properties = (_chat(limits) if kind == "chat" else _completion(limits)) | _left_out(IGNORED, NEUTRAL)
    asked = {"chat": "messages", "completion": "prompt", "response": "input"}[kind]
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["model", asked],
        "additionalProperties": False,
    }
    refusals = {
        400: "not as described, or longer than the model takes",
        401: "no key, or a wrong one",
        404: "no such model",
        408: "the body did not come in time",
        413: "too large",
        429: "too many requests; see Retry-After",
        503: "no engine is there now",
    }
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        "responses": {status: {"description": text} for status, text in refusals.items()},
    }
