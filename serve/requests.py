"""A request's body, checked before any engine sees it: OpenAI's fields only, within the limits."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from plumbline.config.section import out_of_reach
from plumbline.config.serving import Limits
from serve.errors import ApiError

Kind = Literal["chat", "completion"]

_COMMON = {
    "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logprobs",
    "presence_penalty", "frequency_penalty", "logit_bias", "user", "top_k", "min_p", "repetition_penalty",
}  # fmt: skip
FIELDS: dict[Kind, set[str]] = {
    "chat": _COMMON | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"},
    "completion": _COMMON | {"prompt", "echo", "suffix", "best_of"},
}
"""What may be in a body. Engines know more, such as templates and scheduling, which is not a user's to set."""
IGNORED = {
    "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "reasoning_effort", "verbosity",
}  # fmt: skip
"""What clients of OpenAI's send that means nothing here: notes, and hints on how to get to the same answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "web_search_options": (),
}
"""Fields that ask for more than text, and their values that do not."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Whose turn it is, and what templates call that."""


LARGEST = 2**63 - 1
"""Of a number in a body: engines keep whole ones in 64 bits."""


async def read_body(stream: AsyncIterator[bytes], limit: int, seconds: float) -> bytes:
    """A body of at most `limit` bytes. Raises ApiError as soon as there are more (413), or time is over (408)."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in stream:
                body += chunk
                if len(body) > limit:
                    raise ApiError(413, f"The request's body is longer than {limit} bytes.")
    except TimeoutError:
        raise ApiError(408, f"The request's body was not there after {seconds:g} seconds.") from None
    return bytes(body)


def read_object(body: bytes) -> dict[str, Any]:
    """The fields of a body. Raises ApiError (400) where it is no JSON object, or one that cannot be written again."""
    try:
        body.decode("utf-8")
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The JSON body of your request should be an object.")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(400, "A text in the body of your request holds half of a surrogate pair.") from None
    return fields


def check(kind: Kind, fields: Mapping[str, Any], limits: Limits) -> tuple[str, dict[str, Any]]:
    """The model's name, and the fields for the engine. Raises ApiError (400)."""
    fields = {key: value for key, value in fields.items() if value is not None and key not in IGNORED}
    for place, number in out_of_reach(fields, LARGEST):
        what = f"`{place}` is {number!s:.30}; it should be a finite number, within ±{LARGEST}."
        raise ApiError(400, what, param=place.partition(".")[0])
    for key in [key for key in fields if key in NEUTRAL]:
        if fields.pop(key) not in NEUTRAL[key]:
            raise ApiError(400, f"`{key}` asks for what is not served here: these models answer in text.", param=key)
    for key in fields:
        if key not in FIELDS[kind]:
            raise ApiError(400, f"Unrecognized request argument supplied: {key[:64]}", param=key[:64])
    name = fields.pop("model", None)
    if not isinstance(name, str) or not name or len(name) > 128:
        raise ApiError(400, "You must provide a model parameter, a name of `/v1/models`.", param="model")
    _bounds(kind, fields, limits)
    return name, fields


def _bounds(kind: Kind, fields: dict[str, Any], limits: Limits) -> None:
    _bounded(fields, "n", 1, limits.n)
    _bounded(fields, "best_of", 1, limits.n)
    _bounded(fields, "seed", -(2**63), 2**63 - 1)
    for key in ("max_tokens", "max_completion_tokens"):
        _bounded(fields, key, 1, 2**31)
    for key, most in (("top_logprobs", 20), *([("logprobs", 5)] if kind == "completion" else [])):
        _bounded(fields, key, 0, most)
    if not isinstance(fields.get("chat_template_kwargs", {}), dict):
        said = "`chat_template_kwargs` should be an object of what the chat template reads."
        raise ApiError(400, said, param="chat_template_kwargs")
    if "stream" in fields and not isinstance(fields["stream"], bool):
        raise ApiError(400, "`stream` should be true or false.", param="stream")
    if fields.get("echo") and fields.get("logprobs") is not None and fields.get("stream") and fields.get("n", 1) > 1:
        # vLLM 0.29 streams the log-probs of a prompt with the first of its answers alone.
        raise ApiError(400, "`n` above 1 with `echo` and `logprobs` is not streamed; leave out `stream`.", param="n")
    key = "messages" if kind == "chat" else "prompt"
    asked = fields.get(key)
    if kind == "chat":
        if not isinstance(asked, list) or not all(isinstance(turn, dict) for turn in asked):
            raise ApiError(400, "`messages` should be a list of turns, {role, content} each.", param=key)
        fields[key] = [_turn(i, turn) for i, turn in enumerate(asked)]
    elif not _is_prompt(asked):
        raise ApiError(400, "`prompt` should be a text, or a list of texts or of token ids.", param=key)
    if not asked:
        raise ApiError(400, f"`{key}` is empty.", param=key)
    # A list of token ids is one prompt, however many there are.
    if isinstance(asked, list) and not isinstance(asked[0], int) and len(asked) > limits.messages:
        raise ApiError(400, f"`{key}` holds {len(asked)}; this server takes {limits.messages}.", param=key)


def _turn(number: int, turn: dict[str, Any]) -> dict[str, Any]:
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        said = f"`messages.{number}.role` should be one of {', '.join(ROLES)}."
        raise ApiError(400, said, param=f"messages.{number}.role")
    return {**turn, "role": ROLES[role]}


def _is_prompt(asked: Any) -> bool:
    """One or several: texts, or lists of token ids. A truth value is no number here, though it is one to Python."""

    def ids(one: Any) -> bool:
        return isinstance(one, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in one)

    several = isinstance(asked, list) and (all(isinstance(one, str) for one in asked) or all(map(ids, asked)))
    return isinstance(asked, str) or ids(asked) or several


def _bounded(fields: Mapping[str, Any], key: str, least: int, most: int) -> None:
    value = fields.get(key)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise ApiError(400, f"`{key}` should be a whole number.", param=key)
    if not least <= value <= most:
        raise ApiError(400, f"`{key}` is {value}; this server takes {least} to {most}.", param=key)
