"""Which prompts fit into a run: asked before it starts, and by the pipelines, which discard and count the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plumbline.config.pipelines import MethodSection, Preference
from plumbline.config.tree import Config
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render, steerings
from plumbline.errors import DataError
from plumbline.records import Prompt, TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a prompt, plain (at most `limit`) and at its longest with what steers it (at most `room`)."""

    plain: int
    guided: int
    limit: int
    room: int

    @property
    def fit(self) -> bool:
        """Whether the prompt can be used."""
        return self.plain <= self.limit and self.guided <= self.room

    def __str__(self) -> str:
        return f"{self.plain} tokens ({self.guided} with the principle), limit {self.limit} ({self.room})"


def prompt_lengths(
    config: Config, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, steerings: Sequence[str], max_tokens: int
) -> Lengths:
    """`steerings` are the texts put before the prompt; `max_tokens` of `model.max_len` are kept free for the answer."""
    plain = len(render(tokenizer, prompt.messages))
    return Lengths(
        plain=plain,
        guided=max((len(render(tokenizer, prompt.messages, principle=text)) for text in steerings), default=plain),
        limit=config.data.max_prompt_tokens,
        room=config.model.max_len - max_tokens,
    )


def section_lengths(
    config: Config, tokenizer: "PreTrainedTokenizerBase", section: MethodSection, prompt: Prompt
) -> Lengths:
    """A prompt's lengths as a pipeline uses it; one that trains on given pairs generates nothing."""
    given = isinstance(section, Preference) and section.pairs is not None
    tokens = 0 if given else section.generation.max_tokens
    return prompt_lengths(config, tokenizer, prompt, [] if given else steerings(section), tokens)


def sft_group(config: Config, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> TokenGroup | None:
    """(plain prompt, target with EOS); None where it does not fit. `check_targets` has passed."""
    assert prompt.target is not None
    group = TokenGroup(render(tokenizer, prompt.messages), [encode_response(tokenizer, prompt.target)])
    fits = len(group.prompt_ids) <= config.data.max_prompt_tokens and group.tokens <= config.model.max_len
    return group if fits else None


def check_targets(config: Config, prompts: Sequence[Prompt], what: str = "sft") -> None:
    """Raises DataError where a prompt has no target, which `what` needs."""
    for prompt in prompts:
        if prompt.target is None:
            raise DataError(
                f"{config.data.train.path}: the row of id {prompt.id} has no target; {what} needs one in every row "
                "(data.train.columns maps {target: yours})"
            )
