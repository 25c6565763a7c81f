"""OpenAI's newer API, `/v1/responses`, as far as text goes: asked as a chat, answered in the form of that API.

Nothing is stored, so no response continues another: a conversation is sent whole, as `input`.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from serve.errors import ApiError

FIELDS = {
    "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "stream", "stream_options", "user",
}  # fmt: skip
IGNORED = {
    "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "reasoning", "max_tool_calls",
}  # fmt: skip
"""What means nothing here: notes, and hints on how to get to the same answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "text": ({"format": {"type": "text"}}, {}),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "include": ([],),
    "truncation": ("disabled",),
    "background": (False,),
}
"""Fields that ask for more than an answer in text, and their values that do not."""
PARTS = ("input_text", "output_text", "text")


def as_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same request as a chat. Raises ApiError (400)."""
    fields = {key: value for key, value in fields.items() if value is not None and key not in IGNORED}
    for key in [key for key in fields if key in NEUTRAL]:
        if fields.pop(key) not in NEUTRAL[key]:
            raise ApiError(400, f"`{key}` asks for what is not served here: these models answer in text.", param=key)
    for key in fields:
        if key not in FIELDS:
            said = f"Unrecognized request argument supplied: {key[:64]}"
            if key == "previous_response_id":
                said = f"`{key}`: responses are not stored here; send the conversation as `input`."
            raise ApiError(400, said, param=key[:64])
    turns = [{"role": "user", "content": fields["input"]}] if isinstance(fields.get("input"), str) else _turns(fields)
    instructions = fields.get("instructions")
    if not isinstance(instructions, str | None):
        raise ApiError(400, "`instructions` should be a text.", param="instructions")
    chat = {key: value for key, value in fields.items() if key not in ("input", "instructions", "max_output_tokens")}
    chat.pop("stream_options", None)
    if chat.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    if "max_output_tokens" in fields:
        chat["max_completion_tokens"] = fields["max_output_tokens"]
    return chat | {"messages": [*([{"role": "system", "content": instructions}] if instructions else []), *turns]}


def _turns(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = fields.get("input")
    if not isinstance(asked, list) or not asked:
        raise ApiError(400, "`input` should be a text, or a list of messages, {role, content} each.", param="input")
    return [_turn(number, item) for number, item in enumerate(asked)]


def _turn(number: int, item: Any) -> dict[str, Any]:
    place = f"input.{number}"
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise ApiError(400, f"`{place}` should be a message; these models read and write text.", param=place)
    content = item.get("content")
    if isinstance(content, list):
        texts = [one.get("text") for one in content if isinstance(one, dict) and one.get("type") in PARTS]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(map(str, texts)) if whole else None
    if not isinstance(content, str):
        raise ApiError(400, f"`{place}.content` should be a text, or parts of text.", param=f"{place}.content")
    return {"role": item.get("role"), "content": content}


class Form:
    """One response, from the chat that answers it.

    Args:
        asked: the request's own fields, some of which a response repeats.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._asked = asked
        self._id, self._message = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0

    def whole(self, chat: str) -> str:
        """The response, as JSON."""
        answer = json.loads(chat)
        choice = answer["choices"][0]
        text, cut = choice["message"]["content"] or "", choice["finish_reason"] == "length"
        return json.dumps(self._response(answer["model"], text, cut, answer["usage"]), ensure_ascii=False)

    async def events(self, chat: AsyncIterator[Any]) -> AsyncIterator[str]:
        """The events of a stream of which `chat` are the pieces."""
        model, text, cut, usage = "", "", False, None
        async for piece in chat:
            for line in str(piece).splitlines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = chunk["error"]
                    yield self._event("error", code=error.get("code"), message=error["message"], param=None)
                    return
                if not model:
                    model = chunk["model"]
                    for event in self._begin(model):
                        yield event
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    cut = cut or choice["finish_reason"] == "length"
                    if said := choice["delta"].get("content"):
                        text += said
                        yield self._event("response.output_text.delta", **self._place(), delta=said, logprobs=[])
        for event in self._end(model, text, cut, usage):
            yield event

    def _begin(self, model: str) -> list[str]:
        begun = self._response(model, None, False, None)
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._item(None, "in_progress")),
            self._event("response.content_part.added", **self._place(), part=_part("")),
        ]

    def _end(self, model: str, text: str, cut: bool, usage: Mapping[str, int] | None) -> list[str]:
        status = "incomplete" if cut else "completed"
        return [
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=self._item(text, status)),
            self._event(f"response.{status}", response=self._response(model, text, cut, usage)),
        ]

    def _event(self, kind: str, **fields: Any) -> str:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": 0, "content_index": 0}

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"type": "message", "id": self._message, "status": status, "role": "assistant", "content": content}

    def _response(self, model: str, text: str | None, cut: bool, usage: Mapping[str, int] | None) -> dict[str, Any]:
        status = "in_progress" if text is None else "incomplete" if cut else "completed"
        repeated = ("instructions", "max_output_tokens", "temperature", "top_p", "user")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": model,
            "output": [] if text is None else [self._item(text, status)],
            **{key: self._asked.get(key) for key in repeated},
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "store": False,
            "previous_response_id": None,
            "metadata": self._asked.get("metadata") or {},
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "usage": usage and _usage(usage),
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Mapping[str, int]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
