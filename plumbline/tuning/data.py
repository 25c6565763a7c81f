"""What a tuning reads: prompts that the final evaluation does not ask, and how many steps a pipeline has.

`cli.tuning` calls it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from plumbline.config.pipelines import Preference, Sft
from plumbline.config.tree import Config
from plumbline.data.bad_rows import BadRows
from plumbline.data.dataset import as_lines, read_prompts
from plumbline.errors import ConfigError
from plumbline.records import Prompt
from plumbline.runs.disk import write_text
from plumbline.runs.evaluated import heldout_order, prompt_key
from plumbline.runs.preferences import read_table
from plumbline.runs.rows import Rows
from plumbline.tuning.arms import Tuned, TuningData

LEAST = 32
"""Prompts that arms are judged on, unless fewer are asked for."""
MOST_ASIDE = 4
"""One in so many rows of `data.train` at most is judged on in place of learnt from."""


def set_aside(config: Config, rows: Rows, sections: Sequence[Tuned], wanted: int) -> tuple[list[Prompt], Rows]:
    """Prompts to judge arms on, at most `wanted`, and the rows that rungs learn from.

    Held-out ones that the evaluation of the config leaves; where those are too few, of `data.train`, and the rows are
    then without them. Raises ConfigError where those are too few as well, or pipelines learn from files of their own.
    """
    assert config.evaluation is not None and config.data.heldout is not None
    rest, least = heldout_order(rows.heldout, config.seed)[config.evaluation.prompts :][:wanted], min(wanted, LEAST)
    if len(rest) >= least:
        return rest, rows
    own_files = [one.name for one in sections if isinstance(one, Preference) and one.pairs is not None]
    fit = [] if own_files else _fit_all(config, rows, sections)
    taken = heldout_order(fit, config.seed)[: min(wanted, len(fit) // MOST_ASIDE)]
    if len(taken) < least:
        elsewhere = (
            f"`pairs` of {own_files[0]} may have those of data.train" if own_files else f"data.train has {len(fit)}"
        )
        raise ConfigError(
            f"{config.data.heldout.path}: evaluation.prompts leaves {len(rest)} of {len(rows.heldout)} rows, tuning "
            f"asks {least} or more that it does not ({elsewhere}); lower evaluation.prompts or --prompts, or give more"
        )
    known = {prompt_key(prompt) for prompt in taken}

    def without(prompts: Sequence[Prompt]) -> list[Prompt]:
        return [prompt for prompt in prompts if prompt_key(prompt) not in known]

    fits = {name: replace(one, prompts=without(one.prompts)) for name, one in rows.fits.items()}
    return taken, replace(rows, prompts=without(rows.prompts), fits=fits)


def _fit_all(config: Config, rows: Rows, sections: Sequence[Tuned]) -> list[Prompt]:
    """Rows of `data.train` within the limits of all these pipelines, with the targets that they have."""
    ids = set.intersection(*({prompt.id for prompt in rows.fits[section.name].prompts} for section in sections))
    train = config.data.train
    bad = BadRows(train.path, config.data.bad_allowed)
    return [one for one in read_prompts(train.path, target="read", **train.reading_past(bad)) if one.id in ids]


def write_data(data: TuningData, heldout: Sequence[Prompt], rows: Rows, sections: Sequence[Tuned], seed: int) -> None:
    """The files that rungs read. Raises DiskError."""
    write_text(data.heldout, as_lines(heldout))
    for section in sections:
        if isinstance(section, Sft):  # its rungs take the first rows, and a file may be sorted
            write_text(data.train, as_lines(heldout_order(rows.fits[section.name].prompts, seed)))
            return
    if data.aside:
        write_text(data.train, as_lines(rows.prompts))


def data_of(directory: Path, prompts: int, *, aside: bool = False) -> TuningData:
    """What rungs read, in the tuning's directory."""
    return TuningData(
        heldout=directory / "heldout.jsonl", prompts=prompts, train=directory / "train.jsonl", aside=aside
    )


def full_steps(section: Tuned, rows: Rows) -> int:
    """Parts of a whole pass as the config has it; `epochs` repeat them."""
    if isinstance(section, Sft):
        return -(-len(rows.fits[section.name].prompts) // section.learner.batch_size)
    if section.steps:
        return section.steps
    if section.name in rows.fits:
        count = len(rows.fits[section.name].prompts)
    else:  # pairs that another run made
        assert isinstance(section, Preference) and section.pairs is not None
        table = read_table(section.pairs)
        steps, ids = (table.column(name).to_pylist() for name in ("step", "prompt_id"))
        count = len(set(zip(steps, ids, strict=True)))
    return -(-count // section.batch_size)
