"""Which prompts fit into a run: found before it starts, for all rows; the pipelines discard and count the others.

A row is rendered once for each text that is put before its prompt, however many pipelines ask, many rows at a time. It
is tokenised only where a look at its bytes does not say that it fits (`plumbline.data.counting`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plumbline.config.pipelines import MethodSection, Preference
from plumbline.config.reading import OnBad
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.data.ending import encode_responses, most_of_responses
from plumbline.data.prompting import most_of_all, render_all, steerings
from plumbline.data.readers import stop
from plumbline.errors import ModelError, RowError
from plumbline.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 1024
"""Texts of one call of the tokenizer: enough for all its threads, few enough for their ids to be soon forgotten."""
BAD = "bad row"
"""The reason of one that no pipeline can use; others are too long for one."""
UNKNOWN = 2**29
"""A bound where none is known: more than any limit, and two of them are an int32."""
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


class Counts:
    """Tokens of a text of each row: `most` [N] int32 is no less than they are, and what they are where `settle`d."""

    def __init__(self, most: np.ndarray, count: Callable[[np.ndarray], np.ndarray]) -> None:
        self.most = most
        self._count = count
        self._counted = np.zeros(len(most), bool)

    def settle(self, rows: np.ndarray) -> np.ndarray:
        """`most`, after counting the rows of a mask [N] that are not counted yet."""
        left = np.flatnonzero(rows & ~self._counted)
        self.most[left] = self._count(left)
        self._counted[left] = True
        return self.most


class Lengths:
    """Tokens of the prompts and targets of a file; `source` is what messages call it.

    Where the chat template refuses a conversation, every method gives its RowError to `on_bad`; where that goes on
    without the row, it is in `refused`, by the prompt's id, and fits nowhere.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], source: str, on_bad: OnBad = stop
    ) -> None:
        self.prompts = list(prompts)
        self.source = source
        self.refused: dict[str, RowError] = {}
        self._on_bad = on_bad
        self._tokenizer = tokenizer
        self._under: dict[str | None, Counts] = {}
        self._targets: Counts | None = None

    def under(self, steering: str | None) -> Counts:
        """Of the prompts with a text put before them; None is the plain prompt."""
        if steering not in self._under:
            self._under[steering] = self._counts(
                lambda some: self._rendered(most_of_all, some, steering, None),
                lambda some: self._rendered(render_all, some, steering, range(UNKNOWN)),
            )
        return self._under[steering]

    def targets(self) -> Counts:
        """Of the targets with EOS. Every prompt has one."""
        if self._targets is None:
            self._targets = self._counts(
                lambda some: most_of_responses(self._tokenizer, [prompt.target or "" for prompt in some]),
                lambda some: encode_responses(self._tokenizer, [prompt.target or "" for prompt in some]),
            )
        return self._targets

    def _counts(
        self,
        most: Callable[[Sequence[Prompt]], Sequence[int | None]],
        ids: Callable[[Sequence[Prompt]], Sequence[Sequence[int]]],
    ) -> Counts:
        everyone = np.arange(len(self.prompts))
        bounds = self._by_chunk(everyone, lambda some: [UNKNOWN if n is None else n for n in most(some)])
        return Counts(bounds, lambda rows: self._by_chunk(rows, lambda some: [len(one) for one in ids(some)]))

    def _by_chunk(self, rows: np.ndarray, number: Callable[[Sequence[Prompt]], Sequence[int]]) -> np.ndarray:
        numbers = np.zeros(len(rows), np.int32)
        with _in_parallel():
            for start in range(0, len(rows), AT_ONCE):
                some = [self.prompts[i] for i in rows[start : start + AT_ONCE]]
                numbers[start : start + len(some)] = number(some)
        return numbers

    def refuse(self, prompt: Prompt, problem: str) -> None:
        """Leave a prompt out. Raises its RowError where `on_bad` does."""
        if prompt.id not in self.refused:
            error = RowError(self.source, prompt.row, None, problem)
            self._on_bad(error)
            self.refused[prompt.id] = error

    def _rendered(
        self, how: Callable[..., Sequence[Any]], prompts: Sequence[Prompt], steering: str | None, refused: Any
    ) -> Any:
        """`refused` stands for what a refused one would have given."""
        try:
            return how(self._tokenizer, [(prompt.messages, steering) for prompt in prompts])
        except ModelError as error:
            if len(prompts) > 1:  # which of them
                return [one for prompt in prompts for one in self._rendered(how, [prompt], steering, refused)]
            self.refuse(prompts[0], f"{error}; mend or remove the row, or give another `model.chat_template`")
            return [refused]


def prompt_fit(config: Config, section: MethodSection, lengths: Lengths) -> Fit:
    """Prompts within a pipeline's limits, at their longest with what steers them."""
    limit, room = config.data.max_prompt_tokens, _room(config, section)
    plain = lengths.under(None)
    guided = [lengths.under(text) for text in steered_by(section)] or [plain]
    short = plain.settle(plain.most > limit) <= limit
    for one in guided:
        short &= one.settle(one.most > room) <= room
    long = plain.settle(~short)
    longest = np.maximum.reduce([one.settle(~short) for one in guided])
    return _parted(
        lengths,
        short,
        "prompt too long",
        lambda i: f"{long[i]} tokens ({longest[i]} with the principle), limit {limit} ({room})",
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
    limit, room = config.data.max_prompt_tokens, planned(config.model.max_len)
    plain, targets = lengths.under(None), lengths.targets()
    unsure = (plain.most > limit) | (plain.most + targets.most > room)
    long = plain.settle(unsure)
    whole = long + targets.settle(unsure)
    return _parted(
        lengths,
        (long <= limit) & (whole <= room),
        "target too long",
        lambda i: f"{long[i]} tokens ({whole[i]} with the target), limit {limit} ({room})",
    )


def _parted(lengths: Lengths, fits: np.ndarray, reason: str, detail: Callable[[int], str]) -> Fit:
    prompts, refused = lengths.prompts, lengths.refused
    unfit = [Unfit(prompt=prompts[i], reason=reason, detail=detail(i)) for i in np.flatnonzero(~fits)]
    unfit = [one for one in unfit if one.prompt.id not in refused]
    bad = [bad_row(refused[prompt.id], prompt) for prompt in prompts if prompt.id in refused]
    kept = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit and prompt.id not in refused]
    return Fit(prompts=kept, unfit=[*bad, *unfit])


def bad_row(error: RowError, prompt: Prompt | None = None) -> Unfit:
    """A row that no pipeline can use."""
    prompt = prompt or Prompt(id=str(error.row), messages=(), row=error.row)
    return Unfit(prompt=prompt, reason=BAD, detail=str(error))


def _gives_pairs(section: MethodSection) -> bool:
    """Whether a pipeline trains on given pairs: it generates nothing, steers nothing, keeps no room for an answer."""
    return isinstance(section, Preference) and section.pairs is not None


def steered_by(section: MethodSection) -> list[str]:
    """What a pipeline puts before its prompts; nothing where it generates none of its answers."""
    return [] if _gives_pairs(section) else list(dict.fromkeys(steerings(section)))


def _room(config: Config, section: MethodSection) -> int:
    """What `model.max_len` leaves for prompts."""
    return planned(config.model.max_len) - (0 if _gives_pairs(section) else section.generation.max_tokens)


@contextmanager
def _in_parallel() -> Iterator[None]:
    """All processors for the tokenizer, unless the user says otherwise; not once processes are forked from this one."""
    given = os.environ.get(_PARALLEL)
    os.environ.setdefault(_PARALLEL, "true")
    try:
        yield
    finally:
        os.environ[_PARALLEL] = given or "false"
