"""Which prompts arms are judged on, and what rungs learn from."""

import json
from pathlib import Path
from typing import Any

import pytest

from plumbline.config.tree import Config
from plumbline.data.dataset import read_prompts
from plumbline.data.length_filter import Fit
from plumbline.errors import ConfigError
from plumbline.runs.evaluated import heldout_order
from plumbline.runs.rows import Rows
from plumbline.tuning.arms import Tuned, tuned_pipelines
from plumbline.tuning.data import data_of, full_steps, set_aside, write_data
from tests.unit.tuning.test_arms import config

PLE = {"type": "ple", "batch_size": 10}
SFT = {"type": "sft", "policy": {"type": "lora"}, "learner": {"batch_size": 10}}


def given(place: Path, train: int, heldout: int, *pipelines: dict[str, Any]) -> tuple[Config, Rows, list[Tuned]]:
    """A config that evaluates 64 held-out prompts, and what its rows are; the last to train on does not fit."""
    for name, count in (("t", train), ("h", heldout)):
        rows = [{"prompt": f"{name}{i}", "target": f"is {i}"} for i in range(count)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"path": str(place / "t.jsonl")}, "heldout": {"path": str(place / "h.jsonl")}}
    read = config(*pipelines, data=data)
    prompts, held = (read_prompts(data[name]["path"]) for name in ("train", "heldout"))
    sections = tuned_pipelines(read, [], "x")
    fits = {one.name: Fit(prompts=prompts[:-1], unfit=[]) for one in sections}
    return read, Rows(prompts=prompts, heldout=held, fits=fits), sections


def test_held_out_prompts_that_the_evaluation_leaves_are_taken_first(tmp_path: Path) -> None:
    read, rows, sections = given(tmp_path, 400, 100, PLE)
    prompts, left = set_aside(read, rows, sections, 128)
    assert prompts == heldout_order(rows.heldout, read.seed)[64:]
    assert left is rows


def test_where_those_are_too_few_training_rows_are_judged_on_and_not_learnt_from(tmp_path: Path) -> None:
    read, rows, sections = given(tmp_path, 401, 64, PLE, SFT)
    prompts, left = set_aside(read, rows, sections, 128)
    assert len(prompts) == 100, "a quarter of those that fit"
    assert {prompt.target for prompt in prompts} <= {f"is {i}" for i in range(400)}, (
        "with targets, which PLE does not read"
    )
    asked, learnt = ({prompt.query for prompt in some} for some in (prompts, left.prompts))
    assert not asked & learnt and len(asked | learnt) == 401
    assert [full_steps(section, left) for section in sections] == [30, 30]
    data = data_of(tmp_path, len(prompts), aside=True)
    write_data(data, prompts, left, sections[:1], read.seed)
    assert {one.query for one in read_prompts(str(data.train))} == learnt
    assert [one.query for one in read_prompts(str(data.heldout))] == [one.query for one in prompts]


def test_rows_of_the_same_prompt_are_all_set_aside(tmp_path: Path) -> None:
    read, rows, sections = given(tmp_path, 200, 64, PLE)
    path = tmp_path / "t.jsonl"
    path.write_text(path.read_text() * 2)
    twice = read_prompts(str(path))
    rows = Rows(prompts=twice, heldout=rows.heldout, fits={"ple": Fit(prompts=twice, unfit=[])})
    prompts, left = set_aside(read, rows, sections, 32)
    assert not {one.query for one in prompts} & {one.query for one in left.fits["ple"].prompts}


def test_too_few_of_both_is_one_line(tmp_path: Path) -> None:
    read, rows, sections = given(tmp_path, 101, 70, PLE)
    with pytest.raises(ConfigError) as told:
        set_aside(read, rows, sections, 128)
    assert str(told.value) == (
        f"{tmp_path / 'h.jsonl'}: evaluation.prompts leaves 6 of 70 rows, tuning asks 32 or more that it does not "
        "(data.train has 100); lower evaluation.prompts or --prompts, or give more"
    )
    assert len(set_aside(read, rows, sections, 20)[0]) == 20, "fewer are asked for"


def test_prompts_that_a_file_of_pairs_may_have_are_not_judged_on(tmp_path: Path) -> None:
    read, rows, sections = given(tmp_path, 400, 64, {"type": "self_contrast", "pairs": {"path": "p.jsonl"}})
    with pytest.raises(ConfigError, match=r"\(`pairs` of self_contrast may have those of data.train\)"):
        set_aside(read, rows, sections, 128)
