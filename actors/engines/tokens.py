"""What an engine knows of tokens: the tokenizer that its run reads, which tokens end an answer, and a place to put both
for vLLM, which would read them in a way of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.engines.seam import EngineSpec
from plumbline.data.ending import completion, decode, end_ids
from plumbline.data.marks import encode_turns
from plumbline.data.prompting import place_principle
from plumbline.data.tokenizer import read_tokenizer, template_variables
from plumbline.errors import ModelError
from plumbline.records import Completion, Message


class EngineTokens:
    """The tokenizer of a spec, with its chat template.

    Raises:
        ModelError: it cannot be read.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._model = Path(spec.model_path)
        self.tokenizer = read_tokenizer(spec.tokenizer_path or spec.model_path)
        if spec.chat_template is not None:
            self.tokenizer.chat_template = spec.chat_template
        self._ends = end_ids(self.tokenizer, spec.model_path)

    def completion(self, ids: Sequence[int], stop: Sequence[str], *, stopped: bool) -> Completion:
        """See `plumbline.data.ending.completion`."""
        return completion(self.tokenizer, self._ends, ids, stop, stopped=stopped)

    def ends(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether an answer ends with the last of its tokens so far."""
        return ids[-1] in self._ends or (bool(stop) and any(mark in decode(self.tokenizer, ids) for mark in stop))

    def prompt(self, messages: Sequence[Message], template_args: Mapping[str, Any]) -> list[int]:
        """Token ids of a user's conversation, rendered as the run renders its own.

        Raises:
            ModelError: there is no chat template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise ModelError("this model has no chat template; /v1/completions continues a plain text")
        return encode_turns(
            self.tokenizer, place_principle(self.tokenizer, messages, None), template_args=template_args
        )

    def template_variables(self) -> list[str]:
        """What a user may give the chat template; see `plumbline.data.tokenizer.template_variables`."""
        return template_variables(self.tokenizer.get_chat_template()) if self.tokenizer.chat_template else []

    def write(self, directory: Path) -> None:
        """The tokenizer and the model's generation config, with all that ends an answer, as vLLM reads directories.

        The architecture beside them is one for which transformers leaves a tokenizer as its file says.
        """
        self.tokenizer.save_pretrained(directory)
        (directory / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
        own = self._model / "generation_config.json"
        settings = json.loads(own.read_text("utf-8")) if own.is_file() else {}
        text = json.dumps({**settings, "eos_token_id": self._ends or None})
        (directory / "generation_config.json").write_text(text, encoding="utf-8")
