"""All rows of a run, read whole and checked one by one before anything starts: what the pipelines then draw from.

`plumbline.doctor` calls it. A row that cannot be used is refused with its file and number, or, where it is only too
long, listed for the pipelines, which discard and count it.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from plumbline.config.data import ClassifierReward, Source
from plumbline.config.pipelines import Dlma, Preference, RewardModel, Sft
from plumbline.config.tree import Config
from plumbline.data.dataset import LabelledText, Target, read_labelled, read_preferences, read_prompts
from plumbline.data.length_filter import Fit, Lengths, prompt_fit, section_fit, target_fit
from plumbline.data.reward_text import check_conversation
from plumbline.data.tokenizer import read_tokenizer
from plumbline.data.tokenizer_check import check_thoughts
from plumbline.errors import DataError, ModelError
from plumbline.records import Prompt
from plumbline.runs.policies import model_path
from plumbline.runs.preferences import is_parts, read_preference_file, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labelled = Sequence[LabelledText] | Sequence[Prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Rows as their files have them: each of its own kind, and no token counted yet.

    Attributes:
        prompts: of `data.train`; none where only reward models are trained.
        heldout: of `data.heldout`, as far as prompts are asked of it.
        given: of preference files, by the name of the pipeline that trains on them.
        parts: pairs that another run made, by the name of the pipeline.
        rewards: what each `reward` pipeline trains on, and what it is tried on, by its name.
    """

    prompts: list[Prompt]
    heldout: list[Prompt]
    given: Mapping[str, list[Prompt]]
    parts: Mapping[str, pa.Table]
    rewards: Mapping[str, tuple[Labelled, Labelled]]

    def counts(self) -> str:
        """What was read, in words."""
        train = len(self.prompts) or max((len(train) for train, _ in self.rewards.values()), default=0)
        heldout = len(self.heldout) or max((len(heldout) for _, heldout in self.rewards.values()), default=0)
        counted = {"train": train, "heldout": heldout}
        counted |= {f"pairs of {name}": len(rows) for name, rows in (*self.given.items(), *self.parts.items())}
        return ", ".join(f"{name}: {count} rows" for name, count in counted.items() if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the pipelines of a run are given.

    Attributes:
        prompts: of `data.train`, all of them.
        heldout: those that fit into every pipeline.
        fits: what each pipeline uses of its prompts, and the `sft` section, by their names.
        rewards: as `Read` has them.
    """

    prompts: Sequence[Prompt] = ()
    heldout: Sequence[Prompt] = ()
    fits: Mapping[str, Fit] = field(default_factory=dict)
    rewards: Mapping[str, tuple[Labelled, Labelled]] = field(default_factory=dict)


def read_rows(config: Config) -> Read:
    """Every row, by every reader that a pipeline reads it with, in the columns that it reads. Raises DataError."""
    with _nothing_collected():
        return _read(config)


def _read(config: Config) -> Read:
    prompts, heldout = [], []
    train, other = config.data.train, config.data.heldout
    if not all(isinstance(p, RewardModel) for p in config.pipelines):
        prompts = read_prompts(train.path, target=_target(config), **train.reading)
        heldout = read_prompts(other.path, target="read", **other.reading) if other else []
    given, parts, rewards = {}, {}, {}
    for section in config.pipelines:
        if isinstance(section, RewardModel):
            rewards[section.name] = (_labelled(train, section), _labelled(other, section))
            if not other and len(rewards[section.name][0]) < 2:
                raise DataError(
                    f"{train.path}: one row; {section.name} keeps one back to be tried on, and needs another"
                )
        elif isinstance(section, Preference) and section.pairs is not None:
            if isinstance(section, Dlma) or is_parts(section.pairs):  # dlma trains on parts alone: it needs margins
                parts[section.name] = read_table(section.pairs)
            else:
                given[section.name] = read_preference_file(section.pairs)
    return Read(prompts=prompts, heldout=heldout, given=given, parts=parts, rewards=rewards)


def fit_rows(config: Config, tokenizer: "PreTrainedTokenizerBase", read: Read) -> Rows:
    """What of the rows each pipeline can use.

    Raises:
        DataError: a chat template refuses a row, or a pipeline finds none that it can use, or would learn an answer as
            a thought.
        ConfigError: a principle or a contrast that is none.
    """
    train = Lengths(tokenizer, read.prompts, config.data.train.path)
    fits: dict[str, Fit] = {}
    for section in config.methods:
        if section.name in read.given:
            assert isinstance(section, Preference) and section.pairs is not None
            given = Lengths(tokenizer, read.given[section.name], section.pairs.path)
            fits[section.name] = _some(section_fit(config, section, given), given, section.name)
            check_thoughts(tokenizer, given.source, given.prompts)
        elif section.name not in read.parts:
            fits[section.name] = _some(section_fit(config, section, train), train, section.name)
    for stage in (*([config.sft] if config.sft else []), *(p for p in config.pipelines if isinstance(p, Sft))):
        fits[stage.name] = _some(target_fit(config, train), train, stage.name)
    if _target(config) == "needed":
        check_thoughts(tokenizer, train.source, train.prompts)
    heldout = heldout_fit(config, tokenizer, read.heldout)
    _check_conversations(config, tokenizer, read)
    return Rows(prompts=read.prompts, heldout=heldout, fits=fits, rewards=read.rewards)


def heldout_fit(config: Config, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> list[Prompt]:
    """The held-out prompts that are within the limits of every pipeline. Raises DataError as `fit_rows`."""
    if not prompts or config.data.heldout is None:
        return []
    lengths = Lengths(tokenizer, prompts, config.data.heldout.path)
    fits = [_some(prompt_fit(config, section, lengths), lengths, section.name) for section in config.methods]
    unfit = {one.prompt.id for fit in fits for one in fit.unfit}
    kept = [prompt for prompt in prompts if prompt.id not in unfit]
    if not kept:
        raise DataError(f"{lengths.source}: no prompt fits into all pipelines; raise data.max_prompt_tokens")
    return kept


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without Python's search for cycles, which looks at all rows again and again and takes as long as reading them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _target(config: Config) -> Target:
    stages = config.sft is not None or any(isinstance(p, Sft) for p in config.pipelines)
    return "needed" if stages or any(section.needs_target for section in config.methods) else "unread"


def _labelled(source: Source | None, section: RewardModel) -> Labelled:
    """Raises DataError."""
    if source is None:
        return []
    if section.source == "pairs":
        return read_preferences(source.path, **source.reading)
    rows = read_labelled(source.path, **source.reading)
    for row in rows:
        if section.reads == "pair" and row.messages is None:
            raise DataError(
                f"{source.path}, row {row.row}: no `prompt`; a reward model of `reads: pair` needs one in each row"
            )
    return rows


def _some(fit: Fit, lengths: Lengths, name: str) -> Fit:
    """Raises DataError where a pipeline could use nothing."""
    if not fit.prompts:
        first = fit.unfit[0]
        raise DataError(
            f"{lengths.source}: all {len(fit.unfit)} prompts are too long for {name}; the first has {first.detail}: "
            "raise data.max_prompt_tokens and, as far as the model reads, model.max_len, or lower generation.max_tokens"
        )
    return fit


def _check_conversations(config: Config, tokenizer: "PreTrainedTokenizerBase", read: Read) -> None:
    """Every conversation must be one for the rewards that read conversations, those that are trained here too."""
    sources = [(config.data.train, read.prompts), *([(config.data.heldout, read.heldout)] if read.heldout else [])]
    for reward in config.rewards.values():
        if isinstance(reward, ClassifierReward) and reward.reads == "conversation":
            own = read_tokenizer(model_path(reward.path))
            for source, prompts in sources:
                assert source is not None
                _check_each(own, source.path, prompts, f"the reward {reward.path}")
    for section in config.pipelines:
        if isinstance(section, RewardModel) and section.reads == "conversation":
            for source, rows in zip((config.data.train, config.data.heldout), read.rewards[section.name], strict=True):
                if source:
                    _check_each(tokenizer, source.path, rows, section.name)


def _check_each(tokenizer: Any, path: str, rows: Labelled, who: str) -> None:
    for row in rows:
        try:
            check_conversation(tokenizer, row.messages or ())
        except ModelError as error:
            raise DataError(f"{path}, row {row.row}: of {who}, {error}; mend or remove the row") from error
