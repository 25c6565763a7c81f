"""What `plumbline init` proposes: a config that doctor finds nothing wrong with, and choices that follow the data."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from plumbline.config.file import load_config
from plumbline.data.tokenizer import run_tokenizer
from plumbline.errors import DataError, UserError
from plumbline.placement.lengths import settle_lengths
from plumbline.placement.machine import Machine
from plumbline.proposal import Asked, propose
from plumbline.runs.rows import fit_rows, read_rows
from tests.tiny import make_tiny_model, write_rows

CPU = Machine(gpus=0, gib=0, cpus=2, ram_gib=8, per_node=0)
GPU = Machine(gpus=1, gib=80, cpus=16, ram_gib=128, per_node=1)
PROMPTS: list[dict[str, object]] = [{"prompt": f"Tell me about the goat, please, number {i}."} for i in range(60)]
TARGETS: list[dict[str, object]] = [
    {**row, "completion": "The goat eats grass. " * (i % 4 + 1)} for i, row in enumerate(PROMPTS)
]
PAIRS: list[dict[str, object]] = [
    {
        "chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "It eats grass."}],
        "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "No."}],
    }
    for row in PROMPTS
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("init") / "model"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def proposed(here: Path, rows: list[dict[str, object]], model: str, machine: Machine = CPU, **asked: Any) -> Any:
    """The config of what is proposed, once its rows have been read as a run reads them."""
    data = write_rows(here / "data.jsonl", rows)
    out = here / "my_run"
    out.mkdir()
    for name, text in propose(Asked(model=model, data=data, **asked), out, machine).items():
        (out / name).write_text(text, encoding="utf-8")
    config = settle_lengths(load_config(out / "config.yaml"))
    fitted = fit_rows(config, run_tokenizer(config), read_rows(config))
    assert all(fit.prompts for fit in fitted.fits.values()) and fitted.fits
    return config


@pytest.mark.parametrize(
    ("rows", "asked", "kind"),
    [
        (PROMPTS, {}, "dlma"),
        (PROMPTS, {"quality": 'Be kind: "so" #1.'}, "dlma"),
        (PROMPTS, {"reward": True, "quality": "Be kind."}, "ple"),
        (TARGETS, {}, "self_contrast"),
        (TARGETS, {"method": "sft"}, "sft"),
        (TARGETS, {"method": "dlma", "reward": True}, "dlma"),
        (PAIRS, {}, "self_contrast"),
        (PAIRS, {"method": "dlma"}, "dlma"),
    ],
)
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_method_that_the_data_is_for(
    here: Path, model: str, rows: list[dict[str, object]], asked: dict[str, Any], kind: str, machine: Machine
) -> None:
    config = proposed(here, rows, model, machine, **asked)
    [section] = config.pipelines
    assert section.type == kind
    assert (config.reward is not None) == bool(asked.get("reward"))
    if rows is PAIRS and not asked:
        assert section.pairs.path == str(here / "my_run" / "train.jsonl")
    if kind == "ple":
        assert section.principle == "Be kind."
    if kind == "dlma" and "quality" in asked:
        assert section.contrast.positive == asked["quality"]
    assert (config.evaluation is None) == (kind == "sft")


def test_lengths_are_those_of_the_data(here: Path, model: str) -> None:
    config = proposed(here, TARGETS, model)
    assert config.data.max_prompt_tokens == 32 and config.methods[0].generation.max_tokens == 32
    assert config.model.max_len == 192
    assert config.methods[0].batch_size == 32


def test_rows_are_kept_back_and_none_is_lost(here: Path, model: str) -> None:
    proposed(here, TARGETS, model)
    train, heldout = (
        [json.loads(line)["prompt"] for line in (here / "my_run" / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert len(heldout) == 6 and sorted([*train, *heldout]) == sorted(str(row["prompt"]) for row in TARGETS)


def test_columns_of_other_names_are_found(here: Path, model: str) -> None:
    rows: list[dict[str, object]] = [{"question": row["prompt"], "answer": "So.", "n": 1} for row in PROMPTS]
    data, heldout = write_rows(here / "q.jsonl", rows), write_rows(here / "h.jsonl", TARGETS)
    page = propose(Asked(model=model, data=data, heldout=heldout), here / "my_run", CPU)["config.yaml"]
    assert f'train: {{path: "{data}", columns: {{prompt: "question", target: "answer"}}}}' in page
    assert f'heldout: {{path: "{heldout}"}}  # as asked' in page
    page = propose(Asked(model=model, data=heldout, heldout=data), here / "my_run", CPU)["config.yaml"]
    assert f'heldout: {{path: "{data}", columns: {{prompt: "question", target: "answer"}}}}  # as asked' in page


def test_a_first_row_that_lacks_something_decides_nothing(here: Path, model: str) -> None:
    first: dict[str, object] = {"question": "Who?", "answer": None}
    rows = [first, *({"question": row["prompt"], "answer": "So."} for row in PROMPTS)]
    page = propose(Asked(model=model, data=write_rows(here / "q.jsonl", rows)), here / "my_run", CPU)["config.yaml"]
    assert "61 prompts, 60 of them with a target" in page
    rows = [{**PAIRS[0], "chosen": None}, *PAIRS]
    page = propose(Asked(model=model, data=write_rows(here / "p.jsonl", rows)), here / "my_run", CPU)["config.yaml"]
    assert "60 preferences; 1 rows cannot be used" in page


def test_bad_rows_are_left_out_and_told(here: Path, model: str) -> None:
    rows: list[dict[str, object]] = [*TARGETS, {"prompt": ""}]
    data = write_rows(here / "a.jsonl", rows)
    files = propose(Asked(model=model, data=data, heldout=data), here / "my_run", CPU)
    assert "1 rows cannot be used" in files["config.yaml"] and "on_bad_row: skip" in files["config.yaml"]
    files = propose(Asked(model=model, data=write_rows(here / "c.jsonl", TARGETS), heldout=data), here / "r", CPU)
    assert "on_bad_row: skip" in files["config.yaml"]
    with pytest.raises(DataError, match="10 of 70 rows cannot be used"):
        propose(Asked(model=model, data=write_rows(here / "b.jsonl", [*TARGETS, *rows[-1:] * 10])), here / "r", CPU)


@pytest.mark.parametrize(
    ("rows", "asked", "line"),
    [
        (PROMPTS, {"method": "ple"}, "--method ple: it needs a reward; add --reward"),
        (PROMPTS, {"method": "dpo"}, "has no `chosen` and `rejected`"),
        (PROMPTS, {"method": "sft"}, "60 of 60 rows of"),
        (TARGETS, {"method": "sft", "reward": True}, "generates nothing that --reward could score"),
        (PROMPTS, {"quality": "harmles", "reward": True}, "'harmles' is no preset, did you mean 'harmless'"),
        (PROMPTS, {"quality": "a\udcff"}, "'\\udcff' in an option is no whole character"),
        (PROMPTS, {"heldout": "none.jsonl"}, "none.jsonl: no such file"),
    ],
)
def test_what_a_method_lacks_is_told(
    here: Path, model: str, rows: list[dict[str, object]], asked: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        propose(Asked(model=model, data=write_rows(here / "a.jsonl", rows), **asked), here / "my_run", CPU)
    assert line in str(caught.value)


QUALITY = "ple and dlma do: give --method dlma, or leave it out"
EMBEDDER = "self_contrast does, with a target in every row: give --method self_contrast, or leave it out"


@pytest.mark.parametrize(
    ("rows", "asked", "line"),
    [
        (
            TARGETS,
            {"method": "sft", "heldout": "data.jsonl"},
            "--heldout: sft does not read it; all other methods do: give one of them as --method, or leave it out",
        ),
        (TARGETS, {"method": "sft", "quality": "Be kind."}, f"--quality: sft does not read it; {QUALITY}"),
        (PAIRS, {"method": "dpo", "quality": "Be kind."}, f"--quality: dpo does not read it; {QUALITY}"),
        (PAIRS, {"quality": "Be kind."}, f"--quality: dpo, which init chose, does not read it; {QUALITY}"),
        (TARGETS, {"quality": "Be kind."}, f"--quality: self_contrast, which init chose, does not read it; {QUALITY}"),
        (TARGETS, {"method": "sft", "embedder": "e"}, f"--embedder: sft does not read it; {EMBEDDER}"),
        (TARGETS, {"method": "dlma", "embedder": "e"}, f"--embedder: dlma does not read it; {EMBEDDER}"),
        (PROMPTS, {"embedder": "e"}, f"--embedder: dlma, which init chose, does not read it; {EMBEDDER}"),
        (PAIRS, {"embedder": "e"}, f"--embedder: dpo, which init chose, does not read it; {EMBEDDER}"),
        (
            TARGETS,
            {"reward": True, "embedder": "e"},
            f"--embedder: ple, which init chose, does not read it; {EMBEDDER}",
        ),
        (PROMPTS, {"heldout": ""}, "--heldout: it is blank; give it a value, or leave it out"),
        (PROMPTS, {"quality": " "}, "--quality: it is blank; give it a value, or leave it out"),
        (TARGETS, {"embedder": ""}, "--embedder: it is blank; give it a value, or leave it out"),
    ],
)
def test_no_option_is_left_unread(
    here: Path,
    model: str,
    rows: list[dict[str, object]],
    asked: dict[str, Any],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in asked.items()]
    data = write_rows(here / "data.jsonl", rows)
    assert main(["init", "my_run", "--model", model, "--data", data, *options]) == 2
    assert capsys.readouterr() == ("", f"plumbline: {line}\n")
    assert not (here / "my_run").exists()


def test_an_embedder_is_for_self_contrast(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(here / "data.jsonl", TARGETS)
    assert main(["init", "my_run", "--model", model, "--data", data, "--embedder", "none"]) == 2
    page = (here / "my_run" / "config.yaml").read_text()
    assert '\nembedder: {path: "none"}\n' in page and "filter: false" not in page
    told = "embedder.path: none: no such directory; give a sentence-transformers model's\n"
    assert capsys.readouterr().err == f"FAIL reward: {told}"


def test_rows_too_few_to_hold_some_back_are_told(here: Path, model: str) -> None:
    data = write_rows(here / "data.jsonl", TARGETS[:19])
    few = "no heldout, so nothing is evaluated: 19 rows are too few to hold some back; --heldout FILE gives it"
    files = propose(Asked(model=model, data=data), here / "my_run", CPU)
    assert f"  # {few}" in files["config.yaml"].splitlines() and set(files) == {"config.yaml"}
    others: list[dict[str, Any]] = [{"method": "sft"}, {"heldout": data}]
    for asked in others:
        page = propose(Asked(model=model, data=data, **asked), here / "my_run", CPU)["config.yaml"]
        assert "no heldout" not in page
    data = write_rows(here / "more.jsonl", TARGETS[:20])
    files = propose(Asked(model=model, data=data), here / "my_run", CPU)
    assert "no heldout" not in files["config.yaml"] and "heldout.jsonl" in files


def test_the_reward_that_is_written_works(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proposed(here, PROMPTS, model, reward=True)
    monkeypatch.syspath_prepend(str(here))
    names: dict[str, Any] = {}
    exec((here / "my_run" / "test_reward.py").read_text(), names)
    names["test_a_better_answer_has_a_higher_score"]()
    for module in [name for name in sys.modules if name.startswith("my_run")]:
        del sys.modules[module]
    for name in ("my-run", "class", "json", "plumbline"):
        with pytest.raises(UserError, match="of a name that Python can import"):
            propose(Asked(model=model, data=str(here / "data.jsonl"), reward=True), here / name, CPU)


def test_the_command_writes_and_looks(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(here / "data.jsonl", PROMPTS)
    assert main(["init", "my_run", "--model", model, "--data", data]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.startswith("my_run: config.yaml, heldout.jsonl, train.jsonl\n")
    assert captured.out.endswith("next: plumbline run my_run/config.yaml\n")
    before = {path: path.read_bytes() for path in (here / "my_run").iterdir()}
    assert main(["init", "my_run", "--model", model, "--data", data]) == 2
    assert "my_run: is there already" in capsys.readouterr().err
    assert main(["init", "other", "--model", model, "--data", "none.jsonl"]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert main(["init", "other", "--model", model]) == 2
    assert "init: --data is missing" in capsys.readouterr().err
    assert not (here / "other").exists()
    assert {path: path.read_bytes() for path in (here / "my_run").iterdir()} == before


@pytest.mark.parametrize("name", ["日本", "!!!", "123", "null", "a: #", "_x", "a" * 99])
def test_a_directory_may_be_called_anything(here: Path, model: str, name: str) -> None:
    data, out = write_rows(here / "data.jsonl", PROMPTS[:3]), here / name
    out.mkdir()
    (out / "config.yaml").write_text(propose(Asked(model=model, data=data), out, CPU)["config.yaml"], encoding="utf-8")
    assert load_config(out / "config.yaml").data.train.path == data


def test_a_place_where_nothing_can_be_made(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(here / "data.jsonl", PROMPTS)
    for out in (f"{data}/my_run", "a" * 300):
        assert main(["init", out, "--model", model, "--data", data]) == 2
        assert f"{out}: cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("method", [None, "ple", "dlma", "self_contrast", "dpo", "sft"])
def test_what_answers_become_is_asked_where_it_may_be_read(
    here: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str | None
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{model}\nnone.jsonl\n\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["init", "my_run", *([] if method is None else ["--method", method])]) == 2
    out, err = capsys.readouterr()
    asked = "What should answers become, in a sentence (nothing, where targets or pairs in the data say it)? "
    assert out == (
        "Model (a directory or hub name): Data (prompts, targets or preferences): "
        f"{asked if method in (None, 'ple', 'dlma') else ''}"
    )
    assert "none.jsonl: no such file" in err


def test_an_input_that_ends_is_no_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["init", "my_run"]) == 2
    assert "init: --model is missing" in capsys.readouterr().err
