"""What a tuning reads: held-out prompts that the final evaluation does not ask, and how many steps a pipeline has.

`cli.tuning` calls it.
"""

from collections.abc import Sequence
from pathlib import Path

from plumbline.config.pipelines import Preference, Sft
from plumbline.config.tree import Config
from plumbline.data.dataset import as_lines
from plumbline.errors import ConfigError
from plumbline.records import Prompt
from plumbline.runs.disk import write_text
from plumbline.runs.evaluated import heldout_order
from plumbline.runs.preferences import read_table
from plumbline.runs.rows import Rows
from plumbline.tuning.arms import Tuned, TuningData

LEAST = 32
"""Held-out prompts, unless fewer are asked for."""


def unasked(config: Config, heldout: Sequence[Prompt], wanted: int) -> list[Prompt]:
    """Held-out prompts that the evaluation of the config leaves, at most `wanted`. Raises ConfigError."""
    assert config.evaluation is not None and config.data.heldout is not None
    rest = heldout_order(heldout, config.seed)[config.evaluation.prompts :][:wanted]
    if len(rest) < (least := min(wanted, LEAST)):
        raise ConfigError(
            f"{config.data.heldout.path}: evaluation.prompts leaves {len(rest)} of {len(heldout)} rows, and tuning "
            f"asks at least {least} that the evaluation does not; lower evaluation.prompts, or give more rows"
        )
    return rest


def write_data(directory: Path, heldout: Sequence[Prompt], rows: Rows, sections: Sequence[Tuned], seed: int) -> None:
    """The files that `data_of` names. Raises DiskError."""
    write_text(directory / "heldout.jsonl", as_lines(heldout))
    for section in sections:
        if isinstance(section, Sft):  # its rungs take the first rows, and a file may be sorted
            ordered = heldout_order(rows.fits[section.name].prompts, seed)
            write_text(directory / "train.jsonl", as_lines(ordered))


def data_of(directory: Path, prompts: int) -> TuningData:
    """What rungs read, in the tuning's directory."""
    return TuningData(heldout=directory / "heldout.jsonl", prompts=prompts, train=directory / "train.jsonl")


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
