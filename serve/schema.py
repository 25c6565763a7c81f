"""The OpenAPI description of the two bodies, from which clients and tests are made."""

from typing import Any

from plumbline.config.serving import Limits
from serve.requests import ROLES, Kind

_NUMBER = {"type": "number"}


def describe(kind: Kind, limits: Limits) -> dict[str, Any]:
    """What FastAPI adds to the description of a route whose body it does not parse itself."""
    properties: dict[str, Any] = {
        "model": {"type": "string", "maxLength": 128, "description": "a name of /v1/models, or a version: ple@12"},
        "max_tokens": {"type": "integer", "minimum": 1},
        "temperature": {**_NUMBER, "minimum": 0, "maximum": 2},
        "top_p": {**_NUMBER, "exclusiveMinimum": 0, "maximum": 1},
        "n": {"type": "integer", "minimum": 1, "maximum": limits.n},
        "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]},
        "seed": {"type": "integer", "minimum": 0},
        "stream": {"type": "boolean"},
        "presence_penalty": {**_NUMBER, "minimum": -2, "maximum": 2},
        "frequency_penalty": {**_NUMBER, "minimum": -2, "maximum": 2},
    }
    if kind == "chat":
        turn = {
            "type": "object",
            "properties": {
                "role": {"type": "string", "enum": list(ROLES)},
                "content": {"type": "string"},
            },
            "required": ["role", "content"],
        }
        properties |= {
            "messages": {"type": "array", "items": turn, "minItems": 1, "maxItems": limits.messages},
            "max_completion_tokens": {"type": "integer", "minimum": 1},
            "chat_template_kwargs": {
                "type": "object",
                "additionalProperties": {"type": ["boolean", "number", "string"]},
                "description": "variables that the chat template reads, such as enable_thinking",
            },
            "logprobs": {"type": "boolean"},
            "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        }
    else:
        properties |= {
            "prompt": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {
                        "type": "array",
                        "items": {"type": "string", "minLength": 1},
                        "minItems": 1,
                        "maxItems": limits.messages,
                    },
                ]
            },
            "logprobs": {"type": "integer", "minimum": 0, "maximum": 5},
            "echo": {"type": "boolean"},
        }
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["model", "messages" if kind == "chat" else "prompt"],
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
