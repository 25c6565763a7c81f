"""Which prompts fit into a run: found before it starts, for all rows; the pipelines discard and count the others.

A row is tokenised once for each text that is put before its prompt, however many pipelines ask, many rows at a time.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from plumbline.config.pipelines import MethodSection, Preference
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.data.ending import encode_responses
from plumbline.data.prompting import render_all, steerings
from plumbline.errors import DataError, ModelError
from plumbline.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 1024
"""Texts of one call of the tokenizer: enough for all its threads, few enough for their ids to be soon forgotten."""
_PARALLEL = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """A prompt that a pipeline cannot use, and why."""

    prompt: Prompt
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The prompts that a pipeline uses, in the order of the file, and the others."""

    prompts: list[Prompt]
    unfit: list[Unfit]


class Lengths:
    """Tokens of the prompts and targets of a file; `source` is what messages call it.

    Every method raises DataError, which names the row, where the chat template refuses a conversation.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], source: str) -> None:
        self.prompts = list(prompts)
        self.source = source
        self._tokenizer = tokenizer
        self._under: dict[str | None, np.ndarray] = {}
        self._targets: np.ndarray | None = None

    def under(self, steering: str | None) -> np.ndarray:
        """[N] int32, of the prompts with a text put before them; None is the plain prompt."""
        if steering not in self._under:
            self._under[steering] = self._counted(lambda some: self._rendered(some, steering))
        return self._under[steering]

    def targets(self) -> np.ndarray:
        """[N] int32, of the targets with EOS. Every prompt has one."""
        if self._targets is None:
            self._targets = self._counted(
                lambda some: encode_responses(self._tokenizer, [prompt.target or "" for prompt in some])
            )
        return self._targets

    def _counted(self, ids: Callable[[Sequence[Prompt]], Sequence[Sequence[int]]]) -> np.ndarray:
        counts = np.zeros(len(self.prompts), np.int32)
        with _in_parallel():
            for start in range(0, len(counts), AT_ONCE):
                some = self.prompts[start : start + AT_ONCE]
                counts[start : start + len(some)] = [len(one) for one in ids(some)]
        return counts

    def _rendered(self, prompts: Sequence[Prompt], steering: str | None) -> Sequence[Sequence[int]]:
        try:
            return render_all(self._tokenizer, [(prompt.messages, steering) for prompt in prompts])
        except ModelError as error:
            if len(prompts) > 1:  # which of them
                return [ids for prompt in prompts for ids in self._rendered([prompt], steering)]
            raise DataError(
                f"{self.source}, row {prompts[0].row}: {error}; mend or remove the row, or give another "
                "`model.chat_template`"
            ) from error


def prompt_fit(config: Config, section: MethodSection, lengths: Lengths) -> Fit:
    """Prompts within a pipeline's limits, at their longest with what steers them."""
    plain, guided, room = _sizes(config, section, lengths)
    limit = config.data.max_prompt_tokens
    short = (plain <= limit) & (guided <= room)
    return _parted(
        lengths.prompts,
        short,
        "prompt too long",
        lambda i: f"{plain[i]} tokens ({guided[i]} with the principle), limit {limit} ({room})",
    )


def section_fit(config: Config, section: MethodSection, lengths: Lengths) -> Fit:
    """As `prompt_fit`, and with their targets where the pipeline learns from these."""
    fit = prompt_fit(config, section, lengths)
    if not section.needs_target:
        return fit
    whole = target_fit(config, lengths)
    short, long = {one.prompt.id for one in fit.unfit}, {one.prompt.id for one in whole.unfit}
    return Fit(
        prompts=[prompt for prompt in fit.prompts if prompt.id not in long],
        unfit=[*fit.unfit, *(one for one in whole.unfit if one.prompt.id not in short)],
    )


def target_fit(config: Config, lengths: Lengths) -> Fit:
    """Prompts that fit together with their targets, which all have one."""
    plain, whole = lengths.under(None), lengths.under(None) + lengths.targets()
    limit, room = config.data.max_prompt_tokens, planned(config.model.max_len)
    return _parted(
        lengths.prompts,
        (plain <= limit) & (whole <= room),
        "target too long",
        lambda i: f"{plain[i]} tokens ({whole[i]} with the target), limit {limit} ({room})",
    )


def _parted(prompts: Sequence[Prompt], fits: np.ndarray, reason: str, detail: Callable[[int], str]) -> Fit:
    return Fit(
        prompts=[prompt for prompt, fit in zip(prompts, fits, strict=True) if fit],
        unfit=[Unfit(prompt=prompts[i], reason=reason, detail=detail(i)) for i in np.flatnonzero(~fits)],
    )


def _sizes(config: Config, section: MethodSection, lengths: Lengths) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of the prompts plain and at their longest, and what `model.max_len` leaves for them.

    A pipeline that trains on given pairs generates nothing, so it steers nothing and keeps no room for an answer.
    """
    plain = lengths.under(None)
    if isinstance(section, Preference) and section.pairs is not None:
        return plain, plain, planned(config.model.max_len)
    guided = [lengths.under(text) for text in steerings(section)] or [plain]
    return plain, np.maximum.reduce(guided), planned(config.model.max_len) - section.generation.max_tokens


@contextmanager
def _in_parallel() -> Iterator[None]:
    """All processors for the tokenizer, unless the user says otherwise; not once processes are forked from this one."""
    given = os.environ.get(_PARALLEL)
    os.environ.setdefault(_PARALLEL, "true")
    try:
        yield
    finally:
        os.environ[_PARALLEL] = given or "false"
