"""Users' conversations as a run renders its own, for vLLM's OpenAI server. Importing it imports vLLM."""

import asyncio
from collections.abc import Mapping
from typing import Any

from vllm.renderers.online_renderer import OnlineRenderer

from actors.engines.tokens import EngineTokens
from plumbline.records import Message


class Conversations(OnlineRenderer):
    """vLLM's renderer, with the run's tokens in place of what vLLM would make of template and texts.

    Args:
        tokens: how the engine's run reads texts.
    """

    def __init__(self, *args: Any, tokens: EngineTokens, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tokens = tokens

    async def preprocess_chat(self, request: Any, messages: list[Any], *_: Any, **options: Any) -> Any:
        """No conversation, which vLLM needs for `echo` alone, and the prompt, whose length is looked at as any other's.

        Raises:
            ModelError: the chat template refuses the conversation.
        """
        turns = [Message(role=turn["role"], content=text_of(turn)) for turn in messages]
        ids = await asyncio.to_thread(self._tokens.prompt, turns, request.chat_template_kwargs or {})
        return [], await self.preprocess_completion(request, prompt_input=ids, prompt_embeds=None)


def text_of(turn: Mapping[str, Any]) -> str:
    """What a turn says: its content, or the texts of its parts, a line each."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "\n".join(str(part.get("text", "")) for part in content)
