"""All rows of a run, read whole and checked one by one before anything starts: what the pipelines then draw from.

`plumbline.doctor` calls it. A row that cannot be used is refused with its file and number, or, where it is only too
long, listed for the pipelines, which discard and count it.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from plumbline.config.data import ClassifierReward, Source
from plumbline.config.pipelines import Dlma, Preference, RewardModel, Sft
from plumbline.config.tree import Config
from plumbline.data.bad_rows import BadRows
from plumbline.data.dataset import LabelledText, Target, read_labelled, read_preferences, read_prompts
from plumbline.data.length_filter import Fit, Lengths, bad_row, prompt_fit, section_fit, target_fit
from plumbline.data.reward_text import check_conversation
from plumbline.data.tokenizer import read_tokenizer
from plumbline.data.tokenizer_check import check_thoughts
from plumbline.errors import DataError, ModelError, RowError
from plumbline.records import Prompt
from plumbline.runs.policies import model_path
from plumbline.runs.preferences import is_parts, read_preference_file, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labelled = Sequence[LabelledText] | Sequence[Prompt]
_Some = TypeVar("_Some", bound=Sequence[Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Rows as their files have them: each of its own kind, and no token counted yet.

    Attributes:
        prompts: of `data.train`; none where only reward models are trained.
        heldout: of `data.heldout`, as far as prompts are asked of it.
        given: of preference files, by the name of the pipeline that trains on them.
        parts: pairs that another run made, by the name of the pipeline.
        rewards: what each `reward` pipeline trains on, and what it is tried on, by its name.
        bad: of each file that was read, by its path, the rows that cannot be used.
    """

    prompts: list[Prompt]
    heldout: list[Prompt]
    given: Mapping[str, list[Prompt]]
    parts: Mapping[str, pa.Table]
    rewards: Mapping[str, tuple[Labelled, Labelled]]
    bad: Mapping[str, BadRows]

    def counts(self) -> str:
        """What was read, in words."""
        train = len(self.prompts) or max((len(train) for train, _ in self.rewards.values()), default=0)
        heldout = len(self.heldout) or max((len(heldout) for _, heldout in self.rewards.values()), default=0)
        counted = {"train": train, "heldout": heldout}
        counted |= {f"pairs of {name}": len(rows) for name, rows in (*self.given.items(), *self.parts.items())}
        bad = [left_out(one) for one in self.bad.values() if one.errors]
        return "; ".join([", ".join(f"{name}: {count} rows" for name, count in counted.items() if count), *bad])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the pipelines of a run are given.

    Attributes:
        prompts: of `data.train`, all of them.
        heldout: those that fit into every pipeline.
        fits: what each pipeline uses of its prompts, and the `sft` section, by their names.
        rewards: as `Read` has them.
        bad: rows that are in none of these, by the path of their file.
    """

    prompts: Sequence[Prompt] = ()
    heldout: Sequence[Prompt] = ()
    fits: Mapping[str, Fit] = field(default_factory=dict)
    rewards: Mapping[str, tuple[Labelled, Labelled]] = field(default_factory=dict)
    bad: Mapping[str, BadRows] = field(default_factory=dict)


def left_out(bad: BadRows) -> str:
    """In words, of a file with rows that cannot be used."""
    return f"{bad.path}: {len(bad.errors)} rows cannot be used and are left out; the first: {bad.errors[0]}"


def read_rows(config: Config) -> Read:
    """Every row, by every reader that a pipeline reads it with, in the columns that it reads. Raises DataError."""
    with _nothing_collected():
        return _read(config)


def _read(config: Config) -> Read:
    prompts, heldout = [], []
    train, other = config.data.train, config.data.heldout
    bad: dict[str, BadRows] = {}

    def checked(source: Source, read: Callable[[BadRows], _Some]) -> _Some:
        own = bad.setdefault(source.path, BadRows(source.path, config.data.bad_allowed))
        rows = read(own)
        own.check(len(rows))
        return rows

    if not all(isinstance(p, RewardModel) for p in config.pipelines):
        target = _target(config)
        prompts = checked(train, lambda own: read_prompts(train.path, target=target, **train.reading_past(own)))
        if other:
            heldout = checked(other, lambda own: read_prompts(other.path, target="read", **other.reading_past(own)))
    given, parts, rewards = {}, {}, {}
    for section in config.pipelines:
        if isinstance(section, RewardModel):
            learnt, tried = (checked(one, partial(_labelled, one, section)) if one else [] for one in (train, other))
            rewards[section.name] = (learnt, tried)
            if not other and len(learnt) < 2:
                raise DataError(
                    f"{train.path}: one row; {section.name} keeps one back to be tried on, and needs another"
                )
        elif isinstance(section, Preference) and section.pairs is not None:
            if isinstance(section, Dlma) or is_parts(section.pairs):  # dlma trains on parts alone: it needs margins
                parts[section.name] = read_table(section.pairs)
            else:
                given[section.name] = checked(section.pairs, partial(read_preference_file, section.pairs))
    return Read(prompts=prompts, heldout=heldout, given=given, parts=parts, rewards=rewards, bad=bad)


def fit_rows(config: Config, tokenizer: "PreTrainedTokenizerBase", read: Read) -> Rows:
    """What of the rows each pipeline can use.

    Raises:
        DataError: a chat template refuses a row, or more rows than the config allows, or a pipeline finds none that it
            can use, or would learn an answer as a thought.
        ConfigError: a principle or a contrast that is none.
    """
    train = Lengths(tokenizer, read.prompts, config.data.train.path, read.bad[config.data.train.path])
    every = [train]
    if config.data.heldout:
        every.append(Lengths(tokenizer, read.heldout, config.data.heldout.path, read.bad[config.data.heldout.path]))
    rewards = _check_conversations(config, tokenizer, read, every)
    fits: dict[str, Fit] = {}
    for section in config.methods:
        if section.name in read.given:
            assert isinstance(section, Preference) and section.pairs is not None
            path = section.pairs.path
            given = Lengths(tokenizer, read.given[section.name], path, read.bad[path])
            fits[section.name] = _some(section_fit(config, section, given), given, section.name)
            check_thoughts(tokenizer, path, given.prompts)
            every.append(given)
        elif section.name not in read.parts:
            fits[section.name] = _some(section_fit(config, section, train), train, section.name)
    for stage in (*([config.sft] if config.sft else []), *(p for p in config.pipelines if isinstance(p, Sft))):
        fits[stage.name] = _some(target_fit(config, train), train, stage.name)
    if _target(config) == "needed":
        check_thoughts(tokenizer, train.source, train.prompts)
    heldout = _heldout(config, every[1]) if config.data.heldout and read.heldout else []
    for lengths in every:
        read.bad[lengths.source].check(len(lengths.prompts) - len(lengths.refused))
    refused = {(error.file, error.row) for error in train.refused.values()}
    unread = [bad_row(e) for e in read.bad[train.source].errors if (e.file, e.row) not in refused]
    fits = {
        name: fit if name in read.given else replace(fit, unfit=[*unread, *fit.unfit]) for name, fit in fits.items()
    }
    return Rows(prompts=read.prompts, heldout=heldout, fits=fits, rewards=rewards, bad=read.bad)


def heldout_fit(config: Config, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> list[Prompt]:
    """The held-out prompts that are within the limits of every pipeline. Raises DataError as `fit_rows`."""
    if not prompts or config.data.heldout is None:
        return []
    path = config.data.heldout.path
    return _heldout(config, Lengths(tokenizer, prompts, path, BadRows(path, config.data.bad_allowed)))


def _heldout(config: Config, lengths: Lengths) -> list[Prompt]:
    fits = [_some(prompt_fit(config, section, lengths), lengths, section.name) for section in config.methods]
    unfit = {one.prompt.id for fit in fits for one in fit.unfit}
    kept = [prompt for prompt in lengths.prompts if prompt.id not in unfit]
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


def _labelled(source: Source, section: RewardModel, own: BadRows) -> Labelled:
    """Raises DataError."""
    if section.source == "pairs":
        return read_preferences(source.path, **source.reading_past(own))
    kept = []
    for row in read_labelled(source.path, **source.reading_past(own)):
        if section.reads == "pair" and row.messages is None:
            problem = "no `prompt`; a reward model of `reads: pair` needs one in each row"
            own(RowError(source.path, row.row, None, problem))
        else:
            kept.append(row)
    return kept


def _some(fit: Fit, lengths: Lengths, name: str) -> Fit:
    """Raises DataError where a pipeline could use nothing."""
    if not fit.prompts:
        first = fit.unfit[0]
        raise DataError(
            f"{lengths.source}: all {len(fit.unfit)} prompts are too long for {name}; the first has {first.detail}: "
            "raise data.max_prompt_tokens and, as far as the model reads, model.max_len, or lower generation.max_tokens"
        )
    return fit


def _check_conversations(
    config: Config, tokenizer: "PreTrainedTokenizerBase", read: Read, every: Sequence[Lengths]
) -> Mapping[str, tuple[Labelled, Labelled]]:
    """Every conversation must be one for the rewards that read conversations, those that are trained here too.

    Returns the rows of the latter, without those that are none.
    """
    for reward in config.rewards.values():
        if isinstance(reward, ClassifierReward) and reward.reads == "conversation":
            own = read_tokenizer(model_path(reward.path))
            for lengths in every:
                for prompt in lengths.prompts:
                    if problem := _refused(own, prompt, f"the reward {reward.path}"):
                        lengths.refuse(prompt, problem)
    rewards = dict(read.rewards)
    for section in config.pipelines:
        if isinstance(section, RewardModel) and section.reads == "conversation":
            train, heldout = (
                _conversations(tokenizer, source, rows, section.name, read)
                for source, rows in zip((config.data.train, config.data.heldout), rewards[section.name], strict=True)
            )
            rewards[section.name] = (train, heldout)
    return rewards


def _conversations(
    tokenizer: Any, source: Source | None, rows: Labelled, who: str, read: Read
) -> Sequence[LabelledText] | Sequence[Prompt]:
    kept: list[Any] = []
    for row in rows:
        assert source is not None
        if problem := _refused(tokenizer, row, who):
            read.bad[source.path](RowError(source.path, row.row, None, problem))
        else:
            kept.append(row)
    if source is not None:
        read.bad[source.path].check(len(kept))
    return kept


def _refused(tokenizer: Any, row: LabelledText | Prompt, who: str) -> str | None:
    """What is wrong with a conversation for a chat template."""
    try:
        check_conversation(tokenizer, row.messages or ())
    except ModelError as error:
        return f"of {who}, {error}; mend or remove the row"
    return None
