"""vLLM's own OpenAI protocol over an engine that runs already: what `actors.engines.vllm` answers users with."""

import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pydantic import ValidationError

from actors.engines.places import CALLER, Places, Queued
from actors.engines.tokens import EngineTokens
from plumbline.errors import ModelError
from plumbline.records import Head, PolicyRef, UserRequest

NO_CHANCE = -9999.0
"""The log-prob that OpenAI gives a token that cannot be sampled: JSON has no infinity."""


def beyond(body: Mapping[str, Any], vocabulary: int) -> tuple[str, str] | None:
    """The field of a request that names a token which the model has not, and what is wrong with it.

    vLLM compares ids with how many there are, not with the last: on the next one its engine would die.
    """
    asked = body.get("prompt")
    several = asked if isinstance(asked, list) else []
    ids = [id for one in several for id in (one if isinstance(one, list) else [one]) if isinstance(id, int)]
    bias = body.get("logit_bias")
    keys = [*bias] if isinstance(bias, Mapping) else []
    for field, given in (("prompt", ids), ("logit_bias", keys)):
        for one in given:
            number = int(one) if str(one).isascii() and str(one).isdigit() else -1
            if not 0 <= number < vocabulary:
                return field, f"`{field}` names the token {one!r}; this model has 0 to {vocabulary - 1}."
    return None


def strict(answer: Any) -> Any:
    """An answer in which every number is one to strict readers of JSON."""
    if isinstance(answer, float) and not math.isfinite(answer):
        return NO_CHANCE
    if isinstance(answer, dict):
        return {key: strict(value) for key, value in answer.items()}
    return [strict(value) for value in answer] if isinstance(answer, list) else answer


class OpenAIAnswers:
    """Chats and completions, as vLLM's server gives them, from the weights that each request names.

    Args:
        llm: vLLM's `AsyncLLM`.
        model_path: directory of its base model.
        tokens: how its run reads texts.
        seats: answers of one user at once.
    """

    def __init__(self, llm: Any, model_path: str, tokens: EngineTokens, seats: int) -> None:
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
        from vllm.entrypoints.openai.models.protocol import BaseModelPath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels

        from actors.engines.vllm_chat import Conversations

        self._llm = llm
        self._tokens = tokens
        queued: Any = Queued(llm, Places(seats))
        self._vocabulary: int = llm.model_config.get_vocab_size()
        self._models = OpenAIServingModels(llm, [BaseModelPath(name=PolicyRef().public, model_path=model_path)])
        template: Any = {"chat_template": None, "chat_template_content_format": "string"}
        renderer = Conversations(llm.model_config, llm.renderer, tokens=tokens, request_logger=None, **template)
        common: Any = {"online_renderer": renderer, "request_logger": None}
        self._chat = OpenAIServingChat(queued, self._models, "assistant", **common, **template)
        self._completion = OpenAIServingCompletion(queued, self._models, **common)

    async def answer(self, request: UserRequest, lora: Any) -> AsyncIterator[Head | str]:
        """A head, then the body: pieces of an event stream, or one JSON object.

        Args:
            lora: the `LoRARequest` of an adapter; without one, the weights that the engine holds answer.
        """
        from vllm.entrypoints.serve import create_error_response
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        CALLER.set(request.caller)
        name = request.ref.public
        if lora is not None:
            self._models.lora_requests[name] = lora
        else:
            self._models.base_model_paths[0].name = name  # of whole weights an engine holds one version at a time
        result: Any
        try:
            if wrong := beyond(request.body, self._vocabulary) or self._template_args(request.body):
                result = create_error_response(wrong[1], param=wrong[0])
            else:
                result = await self._begin(request, {**request.body, "model": name, "priority": 0})
        except ValidationError as error:
            first = error.errors()[0]
            result = create_error_response(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}")
        except ModelError as error:
            result = create_error_response(str(error), param="messages")
        except Exception as error:  # vLLM's server maps them alike: a wrong value of the user's is a 400
            result = create_error_response(error)
        if isinstance(result, ErrorResponse) and self._llm.errored:
            raise RuntimeError("vLLM's engine is dead")
        if isinstance(result, ErrorResponse):
            yield Head(status=int(result.error.code or 500), streams=False)
            yield result.model_dump_json()
        elif request.streams:
            yield Head(status=200, streams=True)
            async for piece in result:
                yield piece
        else:
            yield Head(status=200, streams=False)
            yield json.dumps(strict(result.model_dump()), ensure_ascii=False, allow_nan=False)

    def forget(self, name: str) -> None:
        """An adapter is no longer there."""
        self._models.lora_requests.pop(name, None)

    def _template_args(self, body: Mapping[str, Any]) -> tuple[str, str] | None:
        """The part of `chat_template_kwargs` that cannot be given to the template, and what is wrong with it."""
        known = self._tokens.template_variables()
        for name, value in (body.get("chat_template_kwargs") or {}).items():
            field = f"chat_template_kwargs.{name[:64]}"
            if name not in known:
                return (
                    field,
                    f"`{field}` is nothing that the chat template reads; it reads {', '.join(known) or 'none'}.",
                )
            if not isinstance(value, bool | int | float | str):
                return field, f"`{field}` should be true, false, a number or a text."
        return None

    async def _begin(self, request: UserRequest, body: dict[str, Any]) -> Any:
        if body.get("temperature") == 0 and body.get("n", 1) > 1:
            body |= {"temperature": 1.0, "top_k": 1}  # the likeliest token again: vLLM takes several of these alone
        if request.kind == "chat":
            from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

            return await self._chat.create_chat_completion(ChatCompletionRequest.model_validate(body))
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        return await self._completion.create_completion(CompletionRequest.model_validate(body))
