"""Preference pairs that are there already: parts that another run made, or a preference file. Read before a run too."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pyarrow as pa

from plumbline.config.data import Source
from plumbline.config.reading import OnBad
from plumbline.data.dataset import read_preferences
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.errors import ConfigError, DataError
from plumbline.records import Message, Prompt, TokenGroup
from plumbline.runs.pairs import PAIR_SCHEMA, pair_samples
from plumbline.runs.parts import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_parts(source: Source) -> bool:
    """Whether a source is a directory of parts rather than a file or dataset."""
    return any(Path(source.path).glob("step-*.parquet")) or (Path(source.path) / "rejected.parquet").exists()


def read_table(source: Source) -> pa.Table:
    """Another run's pairs, in the order of its steps, in the columns of `PAIR_SCHEMA`.

    Raises:
        DataError: there are none, or a part is damaged or holds something else.
        ConfigError: `source` picks rows, and parts are taken whole.
    """
    if source != Source(path=source.path):
        raise ConfigError(
            f"{source.path}: `columns`, `where`, `split` and `limit` pick rows of a file, and these are parts, which "
            "are taken whole; leave them out"
        )
    parts = Parts(source.path, read_only=True)
    tables = []
    for step in parts.steps() if Path(source.path).is_dir() else []:
        table, name = parts.read_table(step), Path(parts.path(step)).name
        if missing := set(PAIR_SCHEMA.names) - set(table.column_names):
            raise DataError(f"{source.path}: {name} is without {sorted(missing)[0]}: these are no preference pairs")
        try:
            tables.append(table.select(PAIR_SCHEMA.names).cast(PAIR_SCHEMA))
        except pa.ArrowException as error:
            raise DataError(f"{source.path}: {name}: these are no preference pairs ({error})") from error
    if not any(table.num_rows for table in tables):
        raise DataError(f"{source.path}: no pairs in it; name a directory of parts, such as runs/NAME/pairs/dlma")
    return pa.concat_tables(tables).combine_chunks()


def check_model(source: Source, models: Sequence[str], fingerprint: str) -> None:
    """Raises DataError where pairs are of another model than the one of `fingerprint`; `models` are theirs."""
    for model in models:
        if model != fingerprint:
            raise DataError(
                f"{source.path}: parts of another model ({str(model)[:12]}, this run's is {fingerprint[:12]}): their "
                "reference log-probs do not hold for it; set `model.path` to theirs, or make the parts anew"
            )


def read_preference_file(source: Source, on_bad: OnBad) -> list[Prompt]:
    """Prompts with `chosen` and `rejected` answers of a preference file; rows that have none go to `on_bad`.

    Raises:
        DataError: every row's answers are equal.
    """
    rows = read_preferences(source.path, **source.reading_past(on_bad))
    if rows and not any(usable_rejected(prompt) for prompt in rows):
        raise DataError(
            f"{source.path}: in all {len(rows)} rows chosen and rejected are the same text: there is nothing to prefer"
        )
    return rows


def usable_rejected(prompt: Prompt) -> list[str]:
    """A row's rejected answers, each once, without those that are equal to its chosen one (METHODS.md §4)."""
    return [text for text in dict.fromkeys(prompt.rejected) if text != prompt.chosen]


def sample_groups(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    columns: Mapping[str, str] | None = None,
    prompts: int,
    least: int,
    max_len: int,
    seed: int,
) -> list[TokenGroup]:
    """A random sample of prompts as groups, the chosen response first, each response once.

    Args:
        path: a preference file or dataset, one rejected answer a row or several (rows with the same prompt and chosen
            answer are one prompt), or a directory of parts such as ``runs/NAME/pairs/self_contrast``.
        prompts: at most so many; of fewer all are used.
        least: so many there must be.
        max_len: tokens of a prompt with a response; longer ones are left out.

    Raises:
        DataError: as `read_preferences`, or fewer than `least` prompts are left.
    """
    groups: list[TokenGroup] = []
    equal = long = 0
    for group in _shuffled(path, tokenizer, columns or {}, Random(seed)):
        if len(group.response_ids) < 2:
            equal += 1
        elif fit := _fit(group, max_len):
            groups.append(fit)
        else:
            long += 1
        if len(groups) >= prompts:
            break
    if len(groups) < least:
        raise DataError(
            f"{path}: {len(groups)} prompts to estimate from, at least {least} are needed ({equal} have no "
            f"rejected answer other than the chosen one, {long} are longer than {max_len} tokens)"
        )
    return groups


def _shuffled(
    path: str, tokenizer: "PreTrainedTokenizerBase", columns: Mapping[str, str], draw: Random
) -> Iterator[TokenGroup]:
    """All prompts in random order, tokenised as they are asked for; no rejected response where none differs."""
    source = Source(path=path)
    if is_parts(source):
        rows = read_table(source).to_pylist()
        yield from draw.sample(groups := [sample.group for sample in pair_samples(rows)], len(groups))
        return
    answers: dict[tuple[tuple[Message, ...], str], dict[str, None]] = {}
    for row in read_preferences(path, columns=columns):
        assert row.chosen is not None
        answers.setdefault((row.messages, row.chosen), {}).update(dict.fromkeys(usable_rejected(row)))
    for (messages, chosen), rejected in draw.sample(list(answers.items()), len(answers)):
        responses = [encode_response(tokenizer, text) for text in (chosen, *rejected)]
        yield TokenGroup(render(tokenizer, messages), responses)


def _fit(group: TokenGroup, max_len: int) -> TokenGroup | None:
    """The group without negatives that are too long; None where the chosen response is, or no negative is left."""
    room = max_len - len(group.prompt_ids)
    chosen, *rejected = group.response_ids
    short = [ids for ids in rejected if len(ids) <= room]
    return TokenGroup(group.prompt_ids, [chosen, *short]) if short and len(chosen) <= room else None
