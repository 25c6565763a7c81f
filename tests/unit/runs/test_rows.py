"""Rows that a run cannot use, with `data.on_bad_row: skip`: left out of every pipeline, counted, and listed."""

from pathlib import Path
from typing import Any

import pytest

from plumbline.config.file import parse_config
from plumbline.config.tree import Config
from plumbline.data.tokenizer import TEMPLATES, load_tokenizer
from plumbline.errors import ConfigError, DataError
from plumbline.runs.rollouts import prompt_text
from plumbline.runs.rows import Rows, fit_rows, left_out, read_rows
from tests.tiny import make_byte_tokenizer, write_rows

NO_ACCENTS = "{% if 'é' in messages[-1].content %}{{ raise_exception('no accents') }}{% endif %}" + TEMPLATES["chatml"]
GOOD: list[dict[str, object]] = [{"prompt": f"Why {i}?", "target": "So."} for i in range(8)]
BAD: list[dict[str, object]] = [
    {"prompt": ""},
    {"prompt": "é", "target": "So."},
    {"prompt": "Why?", "target": "So. " * 99},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    made = load_tokenizer(str(make_byte_tokenizer(directory, "<|im_start|>", "<|im_end|>")), "chatml")
    made.chat_template = NO_ACCENTS
    return made


def config(tmp_path: Path, rows: list[dict[str, object]], **data: Any) -> Config:
    tree = {
        "name": "rows",
        "model": {"path": "model", "max_len": 256},
        "data": {
            "train": {"path": write_rows(tmp_path / "train.jsonl", rows)},
            "heldout": {"path": write_rows(tmp_path / "heldout.jsonl", [*GOOD, BAD[0]])},
            **data,
        },
        "evaluation": {},
        "reward": {"type": "program", "function": "a:b"},
        "pipelines": [
            {"type": "self_contrast", "filter": False, "generation": {"max_tokens": 8}},
            {"type": "dlma", "generation": {"max_tokens": 8}},
        ],
    }
    return parse_config(tree, origin="test")


def fitted(config: Config, tokenizer: Any) -> Rows:
    return fit_rows(config, tokenizer, read_rows(config))


def test_they_are_left_out_and_listed(tmp_path: Path, tokenizer: Any) -> None:
    rows = fitted(config(tmp_path, [*GOOD, *BAD], on_bad_row="skip", max_bad_rows=0.2), tokenizer)
    train = str(tmp_path / "train.jsonl")
    assert [prompt.row for prompt in rows.fits["dlma"].prompts] == [*range(1, 9), 11]
    assert [prompt.row for prompt in rows.fits["self_contrast"].prompts] == list(range(1, 9))
    for name, others in (("dlma", []), ("self_contrast", ["target too long"])):
        unfit = rows.fits[name].unfit
        assert [one.reason for one in unfit] == ["bad row", "bad row", *others]
        assert prompt_text(unfit[0].prompt) == ""
        assert unfit[0].detail.startswith(f"{train}, row 9, prompt: is blank")
        assert unfit[1].detail.startswith(f"{train}, row 10: the chat template refuses the turns (user): no accents")
    assert len(rows.heldout) == 8
    assert {path: [error.row for error in bad.errors] for path, bad in rows.bad.items()} == {
        train: [9, 10],
        str(tmp_path / "heldout.jsonl"): [9],
    }
    assert left_out(rows.bad[train]).startswith(
        f"{train}: 2 rows cannot be used and are left out; the first: {train}, "
    )


def test_more_than_the_share_ends_the_start(tmp_path: Path, tokenizer: Any) -> None:
    allowed = config(tmp_path, [*GOOD, *BAD], on_bad_row="skip", max_bad_rows=0.12)
    with pytest.raises(DataError, match=r"train\.jsonl: 2 of 11 rows cannot be used, and data\.max_bad_rows allows"):
        fitted(allowed, tokenizer)


def test_by_default_the_first_one_does(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, row 9, prompt: is blank"):
        fitted(config(tmp_path, [*GOOD, *BAD]), tokenizer)
    with pytest.raises(ConfigError, match=r"`data\.max_bad_rows` is what `on_bad_row: skip` may leave out"):
        config(tmp_path, GOOD, max_bad_rows=0.2)
