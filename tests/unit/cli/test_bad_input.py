"""Every bad input, through the command line: one line that says what and where, exit code 2, nothing written."""

import gzip
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cli.main import main
from plumbline import doctor
from plumbline.errors import DataError
from plumbline.models.logp_cache import model_fingerprint
from plumbline.placement import sight
from plumbline.records import Message, Prompt
from plumbline.runs.pairs import PAIR_SCHEMA, Answer, pair_rows
from plumbline.runs.parts import Parts
from tests.tiny import make_prompts, make_tiny_adapter, make_tiny_embedder, tiny_config

Change = Callable[[Path, dict[str, Any]], None]
RESUMES = "`plumbline resume {run}` continues it as it was, `--run-dir DIR` or another `name` starts anew"


class World:
    """A directory with all that a run needs, in which a test breaks one thing."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        shutil.copytree(model, directory / "model")
        make_prompts(directory / "prompts.jsonl", 8)
        self.tree = tiny_config(directory)
        self.tree["data"]["heldout"] = {"path": str(directory / "prompts.jsonl")}
        self.tree["evaluation"] = {"prompts": 4}
        self.config = directory / "tiny.yaml"
        self.run_dir = directory / "run"

    def write(self) -> str:
        self.config.write_text(yaml.safe_dump(self.tree), encoding="utf-8")
        return str(self.config)

    def files(self) -> dict[str, bytes | None]:
        """Everything in the directory, what Python itself leaves aside aside."""
        paths = (path for path in self.directory.rglob("*") if "__pycache__" not in path.parts)
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The working directory is the world's, and no cluster is near."""
    (tmp_path / "world").mkdir()
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return World(tmp_path / "world", tiny_model)


@pytest.fixture
def refused(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must end as wrong use, before Ray is imported; returns its line."""

    def refuse(*arguments: str, imports_run: bool = False) -> str:
        before = world.files()
        with monkeypatch.context() as patch:
            if imports_run:
                from pipelines import run

                patch.setattr(run, "start_ray", lambda cpus: pytest.fail("Ray was started"))
            else:
                patch.setitem(sys.modules, "pipelines.run", None)  # importing it is an error
            capsys.readouterr()
            assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert line.startswith("plumbline: ")
        assert world.files() == before, "something was written"
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        return line.removeprefix("plumbline: ")

    return refuse


Refused = Callable[..., str]


def run(world: World, refused: Refused, *arguments: str) -> str:
    return refused("run", world.write(), "--run-dir", str(world.run_dir), *arguments)


def holds(line: str, *parts: str) -> None:
    for part in parts:
        assert part in line, f"{part!r} is not in {line!r}"


def test_the_world_as_it_is_would_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every test below could pass for a reason of its own making. What would start Ray is replaced."""
    started: list[Path] = []

    def run_it(run_dir: Path, listen: Any, checked: doctor.Checked, endpoint: None) -> dict[str, Any]:
        started.append(run_dir)
        assert [prompt.id for prompt in checked.rows.prompts] == [f"p{i}" for i in range(8)]
        return {}

    monkeypatch.setitem(sys.modules, "pipelines.run", SimpleNamespace(run=run_it))
    assert main(["run", world.write(), "--run-dir", str(world.run_dir)]) == 0
    assert started == [world.run_dir]


# The config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pipelines.0.stepz", 8, "pipelines.0.stepz: unknown key; did you mean steps?"),
        ("fleet.generator.replica", 2, "fleet.generator.replica: unknown key; did you mean replicas?"),
        ("pipelines.0.alpha", 1.5, "pipelines.0.alpha: input should be less than or equal to 1, got 1.5"),
        ("pipelines.0.batch_size", 0, "pipelines.0.batch_size: input should be greater than or equal to 1, got 0"),
        (
            "pipelines.0.batch_size",
            "all",
            "pipelines.0.batch_size: input should be a valid integer, unable to parse string as an integer, got 'all'",
        ),
        ("fleet", "big", "fleet: should be a mapping of keys, got 'big'"),
        (
            "pipelines.0.type",
            "dpo",
            "pipelines.0.type: 'dpo' is unknown; known are 'ple', 'dlma', 'self_contrast', 'raft', 'sft', 'reward'",
        ),
        ("reward", None, "config: a `ple` pipeline needs `reward` (type: classifier, program, http, judge or sum)"),
    ],
)
def test_a_bad_key_or_value(world: World, refused: Refused, key: str, value: object, message: str) -> None:
    line = run(world, refused, "--set", f"{key}={json.dumps(value)}")
    assert line == f"{world.config}: {message}"


@pytest.mark.parametrize(
    ("key", "value", "named", "got"),
    [
        ("fleet.sync_tolerance", ".inf", "fleet.sync_tolerance", "inf"),
        ("fleet.generator.gpus", ".nan", "fleet.generator.gpus", "nan"),
        ("pipelines.0.learner.lr", "-.inf", "pipelines.0.learner.lr", "-inf"),
        ("pipelines.0.tau0", "1e999", "pipelines.0.tau0", "'1e999'"),  # text to YAML, a number to the key
        ("pipelines.0.tau0", "1.0e+999", "pipelines.0.tau0", "inf"),
        ("model.init", "{model_type: llama, rope: [1.0, .inf]}", "model.init.rope.1", "inf"),
        ("fleet.generator.vllm", "{speculative_config: {p: .nan}}", "fleet.generator.vllm.speculative_config.p", "nan"),
        ("reward", ".inf", "reward", "inf"),
    ],
)
def test_a_number_that_is_none(world: World, refused: Refused, key: str, value: str, named: str, got: str) -> None:
    line = run(world, refused, "--set", f"{key}={value}")
    assert line.startswith(f"{world.config}: {named}: ") and line.endswith(f"should be a finite number, got {got}")


def test_a_layer_that_the_model_has_not(world: World, refused: Refused) -> None:
    world.tree["pipelines"][0]["policy"] = {"type": "lora", "target_modules": ["q_proj", "query"]}
    assert run(world, refused) == (
        "target_modules of 'ple': the model has no layer 'query'; it has down_proj, gate_proj, k_proj, o_proj, q_proj, "
        "up_proj, v_proj"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set steps: write KEY=VALUE, such as --set fleet.generator.replicas=2"),
        ("pipelines.4.steps=1", "--set pipelines.4.steps=1: '4' is no position in a list of 1; write 0, 1, …"),
        ("name=[", "--set name=[: '[' is no YAML value; quote text that holds : [ { or #"),
    ],
)
def test_a_bad_override(world: World, refused: Refused, override: str, message: str) -> None:
    assert run(world, refused, "--set", override) == message


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_a_config_that_is_not_there(world: World, refused: Refused, command: str) -> None:
    assert refused(command, "none.yaml") == (
        "none.yaml: no such file; name a YAML config, such as configs/quickstart.yaml"
    )


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"name: [tiny\n", "not YAML: "),
        (b"\xff\xfe\x00", "a config is YAML in UTF-8"),
        (b"", "a config is a mapping of keys"),
    ],
)
def test_a_config_that_is_no_yaml(world: World, refused: Refused, content: bytes, part: str) -> None:
    world.config.write_bytes(content)
    holds(refused("run", str(world.config)), "tiny.yaml: ", part)


# The data, as a run and `validate` say it


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows)


GOOD = {"id": "a", "prompt": "Why?"}
BAD_DATA: Mapping[str, tuple[str, bytes | None, list[str]]] = {
    "missing": ("none.jsonl", None, ["none.jsonl: no such file", ".jsonl.gz, .parquet, .csv"]),
    "empty": ("a.jsonl", b"", ["a.jsonl: the file is empty; write at least one row"]),
    "blank": ("a.jsonl", b"\n\n", ["a.jsonl: no rows in it; write at least one"]),
    "broken": ("a.jsonl", lines(GOOD, '{"prompt": "a'), ["a.jsonl, row 2: broken JSON", "one JSON object on a line"]),
    "no object": ("a.jsonl", lines(GOOD, [1]), ["a.jsonl, row 2: a list, not an object"]),
    "no prompt": (
        "a.jsonl",
        lines(GOOD, {"question": "Why?"}),
        ["a.jsonl, row 2: no `prompt` or `messages`", "it has question", "columns: {prompt: question}"],
    ),
    "empty prompt": ("a.jsonl", lines(GOOD, {"prompt": ""}), ["a.jsonl, row 2, prompt: is blank"]),
    "blank prompt": ("a.jsonl", lines(GOOD, {"prompt": " \n"}), ["a.jsonl, row 2, prompt: is blank"]),
    "number": ("a.jsonl", lines(GOOD, {"prompt": 7}), ["a.jsonl, row 2, prompt: is an int, not text"]),
    "Latin-1": (
        "a.jsonl",
        lines(GOOD) + '{"prompt": "é"}\n'.encode("latin-1"),
        ["a.jsonl, row 2: not UTF-8 at byte 42", "save it as UTF-8"],
    ),
    "UTF-16": ("a.jsonl", lines(GOOD).decode().encode("utf-16"), ["a.jsonl, row 1: not UTF-8", "save it as UTF-8"]),
    "duplicate": (
        "a.jsonl",
        lines(GOOD, {"id": "b", "prompt": "b"}, {"id": "a", "prompt": "c"}),
        ["a.jsonl, row 3, id: 'a' is row 1's already; give every row an id of its own"],
    ),
    "turns": (
        "a.jsonl",
        lines(GOOD, {"messages": [{"role": "assistant", "content": "So."}]}),
        ["a.jsonl, row 2, messages: is an answer that no user's turn stands before"],
    ),
    "suffix": ("a.txt", b"Why?\n", ["a.txt: unknown suffix '.txt'; it should be one of .jsonl"]),
    "cut gzip": ("a.jsonl.gz", gzip.compress(lines(GOOD) * 9)[:30], ["a.jsonl.gz: damaged gzip"]),
    "CSV": ("a.csv", b"prompt,target\na,b,c\n", ["a.csv, row 1: 3 cells where the header has 2"]),
    "Parquet": ("a.parquet", b"PAR1", ["a.parquet: damaged Parquet"]),
}


def bad_file(world: World, kind: str) -> tuple[str, list[str]]:
    name, content, parts = BAD_DATA[kind]
    path = world.directory / name
    if content is not None:
        path.write_bytes(content)
    return str(path), parts


@pytest.mark.parametrize("source", ["train", "heldout"])
@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_end_a_run(world: World, refused: Refused, kind: str, source: str) -> None:
    path, parts = bad_file(world, kind)
    world.tree["data"][source]["path"] = path
    holds(run(world, refused), str(world.directory), *parts)


@pytest.mark.parametrize("kind", BAD_DATA)
def test_validate_says_the_same(world: World, refused: Refused, kind: str) -> None:
    path, parts = bad_file(world, kind)
    holds(refused("validate", path), str(world.directory), *parts)


def test_a_mapped_column_that_is_not_there(world: World, refused: Refused) -> None:
    world.tree["data"]["train"]["columns"] = {"target": "answr"}
    holds(run(world, refused), "columns maps target to 'answr', which no row has", "rows have id, prompt, target")


def test_a_bad_column_option(world: World, refused: Refused) -> None:
    line = refused("validate", "prompts.jsonl", "--column", "prompt")
    assert line == "--column prompt: write OURS=THEIRS, such as --column prompt=question"


@pytest.mark.parametrize(
    ("source", "row", "part"),
    [
        ("labelled", {"text": "good", "label": 2}, "row 2, label: is 2; it should be 0 or 1"),
        ("labelled", {"label": 1}, "row 2: no `text`"),
        ("pairs", {"prompt": "Why?", "chosen": "So."}, "row 2: no `rejected`"),
    ],
)
def test_bad_data_of_a_reward_model(
    world: World, refused: Refused, source: str, row: dict[str, object], part: str
) -> None:
    good = {"labelled": {"text": "bad", "label": 0}, "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"}}[source]
    (world.directory / "a.jsonl").write_bytes(lines(good, row))
    world.tree["data"] = {"train": {"path": "a.jsonl"}}
    world.tree |= {"evaluation": None, "reward": None, "model": {"path": world.tree["model"]["path"]}}
    world.tree["pipelines"] = [{"type": "reward", "source": source}]
    holds(run(world, refused), "a.jsonl, ", part)


def test_a_reward_model_of_pairs_without_prompts(world: World, refused: Refused) -> None:
    rows = [{"text": "good", "label": 1, "prompt": "Why?"}, {"text": "bad", "label": 0}]
    (world.directory / "a.jsonl").write_bytes(lines(*rows))
    world.tree["data"] = {"train": {"path": "a.jsonl"}}
    world.tree |= {"evaluation": None, "reward": None, "model": {"path": world.tree["model"]["path"]}}
    world.tree["pipelines"] = [{"type": "reward", "reads": "pair"}]
    holds(run(world, refused), "a.jsonl, row 2: no `prompt`; a reward model of `reads: pair` needs one in each row")


# Prompts that leave nothing to do


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_a_pipeline_whose_every_prompt_is_too_long(world: World, refused: Refused, source: str) -> None:
    row = {"prompt": "Why is the rain? " * 20, "target": "Rain."}
    (world.directory / "long.jsonl").write_bytes(lines(row, row))
    world.tree["data"][source]["path"] = str(world.directory / "long.jsonl")
    holds(
        run(world, refused),
        "long.jsonl: all 2 prompts are too long for ple; the first has ",
        "limit 64 (112)",
        "raise data.max_prompt_tokens",
    )


def test_an_answer_that_leaves_no_room_for_a_prompt(world: World, refused: Refused) -> None:
    line = run(world, refused, "--set", "pipelines.0.generation.max_tokens=127")
    holds(
        line,
        "prompts.jsonl: all 8 prompts are too long for ple",
        "(1)",
        "model.max_len, or lower generation.max_tokens",
    )


def test_sft_without_targets(world: World, refused: Refused) -> None:
    (world.directory / "a.jsonl").write_bytes(lines({**GOOD, "target": "So."}, {"id": "b", "prompt": "How?"}))
    world.tree["data"]["train"]["path"] = "a.jsonl"
    world.tree["sft"] = {}
    holds(run(world, refused), "a.jsonl, row 2: no `target`; it has id, prompt", "columns: {target: ...}")


@pytest.mark.parametrize("target", [None, "", "  ", 4])
def test_a_target_is_checked_by_who_reads_it(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch, target: object
) -> None:
    """PLE reads none; `validate` says of each what a run does."""
    (world.directory / "a.jsonl").write_bytes(
        lines({**GOOD, "target": "So."}, {"id": "b", "prompt": "How?", "target": target})
    )
    world.tree["data"]["train"]["path"] = "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pipelines.run", SimpleNamespace(run=lambda *_: {}))
        assert main(["run", world.write(), "--run-dir", str(world.run_dir)]) == 0
    assert main(["validate", "a.jsonl"]) == 0
    part = "a.jsonl, row 2, target: "
    holds(refused("validate", "a.jsonl", "--kind", "targets"), part)
    world.tree["pipelines"] = [{"type": "self_contrast", "filter": False, "generation": {"max_tokens": 16}}]
    holds(run(world, refused), part)


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_a_row_that_the_chat_template_refuses(world: World, refused: Refused, source: str) -> None:
    """The last of many, so that a look at the first ones would not find it."""
    twice = [{"role": "user", "content": "Why?"}] * 2
    rows = [{"prompt": f"Why {i}?"} for i in range(20)]
    (world.directory / "a.jsonl").write_bytes(lines(*rows, {"messages": twice}))
    (world.directory / "model" / "chat_template.jinja").write_text(ALTERNATING)
    world.tree["data"][source]["path"] = str(world.directory / "a.jsonl")
    holds(
        run(world, refused),
        "a.jsonl, row 21: the chat template refuses the turns (user, user): roles must alternate",
        "mend or remove the row, or give another `model.chat_template`",
    )


def test_a_row_that_a_rewards_chat_template_refuses(world: World, refused: Refused) -> None:
    """A classifier that reads conversations has a template of its own, which no pipeline asks before it scores."""
    (world.directory / "a.jsonl").write_bytes(lines(GOOD, {"messages": [{"role": "user", "content": "Why?"}] * 2}))
    from transformers import LlamaConfig, LlamaForSequenceClassification

    classifier = world.directory / "classifier"
    shutil.copytree(world.directory / "model", classifier)
    settings = LlamaConfig.from_pretrained(classifier, num_labels=1)
    LlamaForSequenceClassification(settings).save_pretrained(classifier)
    (classifier / "chat_template.jinja").write_text(ALTERNATING)
    world.tree["data"]["train"]["path"] = str(world.directory / "a.jsonl")
    world.tree["reward"] = {"type": "classifier", "path": str(classifier), "reads": "conversation"}
    holds(
        run(world, refused),
        "a.jsonl, row 2: of the reward ",
        "the chat template refuses the turns",
        "roles must alternate",
    )


def test_sft_whose_every_prompt_is_too_long(world: World, refused: Refused) -> None:
    world.tree |= {"evaluation": None, "reward": None}
    del world.tree["data"]["heldout"]
    world.tree["pipelines"] = [{"type": "sft"}]
    line = run(world, refused, "--set", "data.max_prompt_tokens=3")
    holds(line, "prompts.jsonl: all 8 prompts are too long for sft; the first has 26 tokens (39 with the target)")


def test_a_principle_that_is_no_preset(world: World, refused: Refused) -> None:
    line = run(world, refused, "--set", "pipelines.0.principle=harmles")
    holds(line, "principle 'harmles' is no preset, did you mean 'harmless'?")


# The model


def lose(*names: str) -> Change:
    def change(directory: Path, tree: dict[str, Any]) -> None:
        for name in names:
            (directory / "model" / name).unlink()

    return change


def write(name: str, content: str) -> Change:
    def change(directory: Path, tree: dict[str, Any]) -> None:
        (directory / "model" / name).write_text(content)

    return change


def point_elsewhere(directory: Path, tree: dict[str, Any]) -> None:
    tree["model"]["path"] = str(directory / "no-model")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (point_elsewhere, ["model.path: ", "no-model: no such directory; give a model's directory"]),
        (lose("config.json"), ["model.path: ", "model: no model: there is no config.json in it"]),
        (lose("model.safetensors"), ["model.path: ", "no *.safetensors in it", "safe_serialization=True"]),
        (write("config.json", "{"), ["model.path: ", "config.json: not a JSON object"]),
        (write("config.json", "[]"), ["model.path: ", "config.json: not a JSON object"]),
        (lose("tokenizer.json", "tokenizer_config.json"), ["has no tokenizer", "tokenizer.json"]),
        (write("tokenizer.json", "{"), ["its tokenizer cannot be loaded"]),
        (
            lose("chat_template.jinja"),
            ["has no chat template: set model.chat_template to a Jinja file or one of chatml, plain"],
        ),
        (write("chat_template.jinja", "Hello."), ["drops the user's turn"]),
    ],
)
def test_a_model_that_is_none(world: World, refused: Refused, change: Change, parts: list[str]) -> None:
    change(world.directory, world.tree)
    holds(run(world, refused), *parts)


def test_a_chat_template_that_is_none(world: World, refused: Refused) -> None:
    line = run(world, refused, "--set", "model.chat_template=chatm")
    holds(line, "model.chat_template 'chatm' is neither a file nor a built-in name, did you mean 'chatml'?")


def test_the_option_that_the_message_names_mends_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lose("chat_template.jinja")(world.directory, world.tree)
    monkeypatch.setitem(sys.modules, "pipelines.run", SimpleNamespace(run=lambda *_: {}))
    assert main(["run", world.write(), "--run-dir", str(world.run_dir), "--set", "model.chat_template=chatml"]) == 0


def rewrite(world: World, change: Callable[[dict[str, Any]], object], **settings: Any) -> None:
    """The model's weights changed in place, and keys of its config.json."""
    from safetensors.torch import load_file, save_file

    file = world.directory / "model" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    config = world.directory / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))


def resize(world: World, rows: int) -> None:
    import torch

    def change(weights: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], weights[name]])[:rows].clone()

    rewrite(world, change, vocab_size=rows)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda weights: weights.pop(NORM), f"model: it lacks {NORM}; save it whole again"),
        (lambda weights: weights.update({"a": weights[NORM].clone()}), "its config.json knows nothing of: a; save"),
        (lambda weights: weights[NORM].fill_(math.nan), f"{NORM} has values that are no finite numbers"),
    ],
)
def test_a_model_that_is_damaged(world: World, refused: Refused, change: Callable[..., object], part: str) -> None:
    rewrite(world, change)
    holds(run(world, refused), "model.path: ", part)


@pytest.mark.parametrize("pipeline", [{"type": "sft"}, {"type": "reward"}])
def test_names_with_a_prefix_are_nobodys(world: World, refused: Refused, pipeline: dict[str, Any]) -> None:
    (world.directory / "a.jsonl").write_bytes(lines({"text": "good", "label": 1}, {"text": "bad", "label": 0}))
    if pipeline["type"] == "reward":
        world.tree["data"] = {"train": {"path": "a.jsonl"}}
        del world.tree["model"]["max_len"]
    world.tree["pipelines"] = [pipeline]
    world.tree |= {"evaluation": None, "reward": None}
    world.tree["data"].pop("heldout", None)
    rewrite(world, lambda weights: [weights.update({f"module.{k}": weights.pop(k)}) for k in list(weights)])
    holds(run(world, refused), "model.path: ", "it lacks ", "(there is module.", "save it whole again")


def test_a_vocabulary_may_be_larger_than_the_tokenizers_and_not_smaller(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize(world, 668)
    holds(run(world, refused), "model.path: ", "its vocabulary has 668 entries, and the tokenizer goes to id 670 ('")
    resize(world, 700)
    monkeypatch.setitem(sys.modules, "pipelines.run", SimpleNamespace(run=lambda *_: {}))
    assert main(["run", world.write(), "--run-dir", str(world.run_dir)]) == 0


@pytest.mark.usefixtures("enough_memory")
def test_an_adapter_is_looked_at_with_its_base(
    world: World, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_tiny_adapter(world.directory / "adapter", world.directory / "model")
    world.tree["model"]["adapter"] = "adapter"
    capsys.readouterr()
    assert main(["doctor", world.write(), "--run-dir", str(world.run_dir)]) == 0
    holds(capsys.readouterr().out, f"model with a LoRA adapter of rank 4 in {adapter}; ")
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    weights[first][0, 0] = math.inf
    save_file(weights, file)
    holds(run(world, refused), "model.adapter: ", f"{first} has values that are no finite numbers")
    del weights[first]
    save_file(weights, file)
    holds(run(world, refused), "model.adapter: ", "made on another model than ", "it lacks ")
    world.tree["model"]["path"] = "adapter"
    del world.tree["model"]["adapter"]
    holds(run(world, refused), "model.path: ", "an adapter on ", f"`model.adapter: {adapter}`")


def test_an_adapter_without_a_base(world: World, refused: Refused) -> None:
    world.tree["model"] = {"adapter": "a", "init": {"model_type": "llama"}, "tokenizer": str(world.directory / "model")}
    holds(run(world, refused), "`adapter` changes a model that is there; give `path` (its base) in place of `init`")


# Lengths


def test_more_tokens_than_the_model_reads(world: World, refused: Refused) -> None:
    line = run(world, refused, "--set", "model.max_len=268")
    assert line == "model.max_len: 268, but its model reads 256 tokens at most; write auto"


def test_a_length_that_is_not_given_is_what_the_model_reads(world: World, refused: Refused) -> None:
    del world.tree["model"]["max_len"]
    line = run(world, refused, "--set", "pipelines.0.generation.max_tokens=255")
    holds(line, "limit 64 (1)", "or lower generation.max_tokens")


@pytest.mark.parametrize("key", ["reward", "evaluation.judge"])
def test_more_tokens_than_a_reward_reads(world: World, refused: Refused, key: str) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    path = world.directory / "classifier"
    shutil.copytree(world.directory / "model", path)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=671,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=64,
        )
    ).save_pretrained(path)
    reward = {"type": "classifier", "path": str(path), "max_len": 65}
    section = world.tree if key == "reward" else world.tree["evaluation"]
    section[key.rpartition(".")[2]] = reward
    assert run(world, refused) == f"{key}.max_len: 65, but its model reads 64 tokens at most; write auto"


# Rewards


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("no_such_module:score", ["No module named 'no_such_module'", "write module:function"]),
        ("plumbline.miniature.reward:skore", ["plumbline.miniature.reward has no function 'skore'"]),
        ("plumbline.miniature.reward:__doc__", ["plumbline.miniature.reward has no function '__doc__'"]),
        ("reward_that_is_broken:score", ["SyntaxError: "]),
        ("reward_that_fails:score", ["RuntimeError: no licence"]),
    ],
)
def test_a_reward_function_that_is_none(world: World, refused: Refused, function: str, parts: list[str]) -> None:
    (world.directory / "reward_that_is_broken.py").write_text("def score(:\n")
    (world.directory / "reward_that_fails.py").write_text("raise RuntimeError('no\\nlicence')\n")
    alone = world.tree["reward"] | {"function": function}
    world.tree["reward"] = {"type": "sum", "of": [{"reward": world.tree["reward"]}, {"reward": alone, "name": "two"}]}
    holds(run(world, refused), f"reward.of.1.reward.function: {function}: ", *parts)
    world.tree["reward"] = alone
    holds(run(world, refused), f"reward.function: {function}: ", *parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (None, ["no such directory"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["no sequence classifier (it is LlamaForCausalLM)"]),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
            ["a classifier of 3 labels; a reward has 1 or 2"],
        ),
    ],
)
@pytest.mark.parametrize("key", ["reward", "evaluation.judge"])
def test_a_classifier_that_is_none(
    world: World, refused: Refused, key: str, settings: dict[str, Any] | None, parts: list[str]
) -> None:
    path = world.directory / "classifier"
    if settings is not None:
        shutil.copytree(world.directory / "model", path)
        (path / "config.json").write_text(json.dumps(settings))
    reward = {"type": "classifier", "path": str(path)}
    if key == "reward":
        world.tree["reward"] = reward
    else:
        world.tree["evaluation"]["judge"] = reward
    holds(run(world, refused), f"{key}.path: {path}: ", *parts)


# Devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes torch see so many CUDA devices, whatever this machine has."""
    import torch

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr("plumbline.placement.machine.gpu_gib", lambda index: 80.0)

    return see


def test_a_device_that_is_not_there(world: World, refused: Refused, gpus: Callable[[int], None]) -> None:
    gpus(0)
    line = run(world, refused, "--set", "fleet.device=cuda")
    assert line == "fleet.device: cuda, but no CUDA device is visible here; write cpu or auto"


def test_a_deterministic_run_on_gpus(world: World, refused: Refused, gpus: Callable[[int], None]) -> None:
    gpus(1)
    line = run(world, refused, "--deterministic")
    holds(line, "deterministic: kernels of GPUs", "write fleet.device: cpu, or leave it out")


@pytest.mark.parametrize(
    ("there", "override", "part"),
    [
        (0, "pipelines.0.learner.gpus=1", "ask for 1 GPUs, 0 are here"),
        (0, "fleet.generator.gpus=0.5", "ask for 0.5 GPUs, 0 are here"),
        (1, "pipelines.0.learner={workers: 2, gpus: 1}", "ask for 2 GPUs, 1 are here"),
        (1, "fleet.scorer={replicas: 3, gpus: 0.5}", "ask for 1.5 GPUs, 1 are here"),
    ],
)
def test_gpus_that_are_not_there(
    world: World, refused: Refused, gpus: Callable[[int], None], there: int, override: str, part: str
) -> None:
    gpus(there)
    line = run(world, refused, "--set", override)
    holds(line, f"fleet and learners {part}; lower ", "learner.gpus", "RAY_ADDRESS")


def test_an_engine_that_is_not_installed(world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    line = run(world, refused, "--set", "fleet.engine=vllm")
    assert line == "fleet.engine: vllm, but vLLM is not installed here; write auto or transformers"


# Run directories


def test_a_run_directory_that_holds_another_config(world: World, refused: Refused) -> None:
    from plumbline.config.file import load_config
    from plumbline.runs.directory import open_run_dir

    with open_run_dir(load_config(world.write()), world.run_dir):
        pass
    line = run(world, refused, "--set", "pipelines.0.learner.lr=0.5")
    assert line == (
        f"{world.run_dir}: holds another config (`pipelines.0.learner.lr` is 0.001 there, 0.5 here); "
        + RESUMES.format(run=world.run_dir)
    )


def test_a_run_directory_whose_config_is_broken(world: World, refused: Refused) -> None:
    world.run_dir.mkdir()
    (world.run_dir / "config.yaml").write_text("nam: tiny\n")
    assert run(world, refused) == f"{world.run_dir}/config.yaml: nam: unknown key; did you mean name?"


def test_a_run_directory_that_is_something_else(world: World, refused: Refused) -> None:
    world.run_dir.mkdir()
    (world.run_dir / "thesis.tex").write_text("")
    assert run(world, refused) == f"{world.run_dir}: exists and is no run directory; name another with --run-dir"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_run_directory_that_is_a_file(world: World, refused: Refused, below: str) -> None:
    world.run_dir.write_text("")
    line = refused("run", world.write(), "--run-dir", str(world.run_dir / below))
    holds(line, f"{world.run_dir}", "name another", "--run-dir")


def test_a_disk_that_is_full(world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**29))
    holds(run(world, refused), "0.50 GiB free, a run needs at least 1; name another place with --run-dir")


@pytest.mark.parametrize("command", ["resume", "evaluate"])
@pytest.mark.parametrize("name", ["none", "model"])
def test_a_directory_that_is_no_run(world: World, refused: Refused, command: str, name: str) -> None:
    holds(refused(command, name), f"{name}: no run directory: there is no config.yaml in it")


# evaluate


@pytest.fixture
def finished(world: World) -> World:
    """A run directory with two versions of `ple`."""
    from plumbline.config.file import load_config
    from plumbline.runs.directory import open_run_dir

    with open_run_dir(load_config(world.write()), world.run_dir):
        pass
    for version in (1, 12):
        (world.run_dir / "policies" / "ple" / f"v{version:06d}").mkdir(parents=True)
    return world


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--of", "base", "ple@3"], "run: no version 'ple@3'; there are ple@1 to ple@12"),
        (["--of", "ple@new"], "run: no version 'ple@new'; there are ple@1 to ple@12"),
        (["--of", "dlma"], "run: no policy 'dlma'; there are base, ple"),
        (["--of", "base", "run"], "--of: run: no model: there is no config.json in it"),
        (["--of", "base", "--prompts", "0"], "--prompts 0: it should be 1 or more"),
    ],
)
def test_what_cannot_be_evaluated(finished: World, refused: Refused, arguments: list[str], part: str) -> None:
    holds(refused("evaluate", str(finished.run_dir), *arguments, imports_run=True), part)


def test_a_run_without_held_out_data_is_not_evaluated(world: World, refused: Refused) -> None:
    del world.tree["data"]["heldout"], world.tree["evaluation"]
    world.run_dir.mkdir()
    shutil.copy(world.write(), world.run_dir / "config.yaml")
    line = refused("evaluate", str(world.run_dir), imports_run=True)
    holds(line, "run/config.yaml: to evaluate, it needs `evaluation` and `data.heldout`")


# doctor


@pytest.fixture
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 2**30))


LOOKS = [
    *("versions", "model", "reward", "weights", "lengths", "data", "devices", "engine", "memory", "storage"),
    *("run directory", "tracking", "ports"),
]
PLAN = ["role", "generator", "scorer", "learner of ple"]
"""First words of the table that follows."""


@pytest.mark.usefixtures("enough_memory")
def test_doctor_finds_nothing_wrong(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = world.write(), world.files()
    assert main(["doctor", path, "--run-dir", str(world.run_dir)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    told = [line.split(":")[0] for line in lines if line.startswith("ok")]
    assert told == [f"ok   {look}" for look in [*LOOKS, "placement"]]
    assert [line.split("  ")[0] for line in lines[-4:]] == PLAN
    [data] = [i for i, line in enumerate(lines) if line.startswith("ok   data: ")]
    assert lines[data + 1].startswith("  the prompt, of which nothing is learnt: ")
    holds(captured.out, "llama in ", "train: 8 rows, heldout: 8 rows")
    assert world.files() == before


@pytest.mark.usefixtures("enough_memory")
def test_doctor_names_all_that_is_wrong(
    world: World, capsys: pytest.CaptureFixture[str], gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        def __enter__(self) -> "Closed":
            return self

        def __exit__(self, *_: object) -> None: ...

        def bind(self, address: tuple[str, int]) -> None:
            raise PermissionError(1, "Operation not permitted")

    gpus(0)
    monkeypatch.setattr(doctor.socket, "socket", Closed)
    world.tree["data"]["train"]["path"] = "none.jsonl"
    world.tree["reward"]["function"] = "no_such_module:score"
    world.tree["pipelines"][0]["learner"]["gpus"] = 1
    (world.directory / "model" / "config.json").unlink()
    world.run_dir.write_text("")
    path, before = world.write(), world.files()
    assert main(["doctor", path, "--run-dir", str(world.run_dir)]) == 2
    captured = capsys.readouterr()
    failed = [line.split(":")[0].removeprefix("FAIL ") for line in captured.err.splitlines()]
    assert failed == ["model", "reward", "data", "devices", "run directory", "ports"]
    fine = [line.split(":")[0].removeprefix("ok   ") for line in captured.out.splitlines()]
    assert fine == ["versions", "weights", "lengths", "memory", "storage", "tracking", "placement"], (
        "none was made, which is no news"
    )
    holds(
        captured.err,
        "no config.json",
        "No module named 'no_such_module'",
        "none.jsonl: no such file",
        "ask for 1 GPUs",
        "no port can be opened on 127.0.0.1 ([Errno 1] Operation not permitted); Ray needs some",
    )
    assert world.files() == before


NOT_FETCHED = "model.path: smollm2: no such GGUF file; fetch it by: plumbline fetch smollm2"


def failures(world: World, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Doctor's lines about what would fail, and the names of what is fine. Nothing is in the user's cache."""
    assert main(["doctor", world.write(), "--run-dir", str(world.run_dir)]) == 2
    captured = capsys.readouterr()
    fine = [line.split(":")[0].removeprefix("ok   ") for line in captured.out.splitlines() if line.startswith("ok")]
    return captured.err.splitlines(), fine


@pytest.mark.usefixtures("enough_memory")
@pytest.mark.parametrize(
    ("path", "cache", "message"),
    [
        ("smollm2", "cache", NOT_FETCHED),
        (
            "models/foo.gguf",
            "cache",
            "model.path: models/foo.gguf: no such GGUF file; give the path of one that is there",
        ),
        ("cut.gguf", "cache", "model.path: {world}/cut.gguf: no GGUF file, or damaged ("),
        (
            "cut.gguf",
            "cut.gguf",
            "{world}/cut.gguf/plumbline/gguf: cannot be made (Not a directory); let XDG_CACHE_HOME ",
        ),
    ],
)
def test_doctor_names_a_gguf_model_that_cannot_be_had(
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    cache: str,
    message: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.directory / cache))
    (world.directory / "cut.gguf").write_bytes(b"GGUF")
    world.tree["model"]["path"] = path
    [line], fine = failures(world, capsys)
    assert line.startswith(f"FAIL model: {message.format(world=world.directory)}")
    assert "versions" in fine and "data" in fine and "hub" not in fine and "reward" not in fine


@pytest.mark.usefixtures("enough_memory")
def test_doctor_tells_a_gguf_model_from_those_of_the_hub(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.directory / "cache"))
    world.tree |= {"reward": {"type": "classifier", "path": "org/reward"}, "commits": {"org/reward": "0" * 40}}
    world.tree["model"]["path"] = "smollm2"
    [line], fine = failures(world, capsys)
    assert line == f"FAIL model: {NOT_FETCHED}" and "hub" in fine


def test_a_gguf_file_that_is_not_there_is_no_hub_model(world: World, refused: Refused) -> None:
    line = run(world, refused, "--set", "model.path=models/foo.gguf")
    assert line == "model.path: models/foo.gguf: no such GGUF file; give the path of one that is there"


def test_doctor_counts_memory(
    world: World, capsys: pytest.CaptureFixture[str], gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    gpus(0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    assert main(["doctor", world.write()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    holds(line, "FAIL memory: memory: about 4.7 GiB are needed, 1.0 are free", "fleet.generator.replicas")


@pytest.mark.usefixtures("enough_memory")
def test_what_finds_no_room_is_told_with_what_would_help(
    world: World,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
    gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card of a few GiB: the table, the error, the exit code, and the same error at a run's start."""
    gpus(1)
    monkeypatch.setattr("plumbline.placement.machine.gpu_gib", lambda index: 2.0)
    assert main(["doctor", world.write()]) == 2
    captured = capsys.readouterr()
    told = "placement: 1 GPU has no room for all at once (GiB: generator 2.5, learner of ple "
    [line] = captured.err.splitlines()
    holds(line, f"FAIL placement: {told}", "; of 2 GiB a GPU, 2 are dealt out; ")
    assert [row.split("  ")[0] for row in captured.out.splitlines()[-4:]] == PLAN
    holds(run(world, refused), told)


@pytest.mark.usefixtures("enough_memory")
def test_a_gpu_is_used_without_a_word_in_the_config(
    world: World, capsys: pytest.CaptureFixture[str], gpus: Callable[[int], None]
) -> None:
    gpus(1)
    assert main(["doctor", world.write()]) == 0
    *_, generator, scorer, learner = capsys.readouterr().out.splitlines()
    holds(generator, "GPU 0")
    holds(learner, "GPU 0")
    holds(scorer, "CPU")  # it is a function


def test_doctor_misses_a_package(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor.TESTED, "no-such-package", "1.2")
    main(["doctor", world.write()])
    holds(capsys.readouterr().err, "FAIL versions: no-such-package is not installed; `make setup` installs 1.2")


def test_doctor_says_which_version_was_not_tested(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor.TESTED, "torch", "1.0")
    main(["doctor", world.write()])
    holds(capsys.readouterr().out, "(tested with 1.0)")


# Pairs, negatives and embedders


def contrasting(world: World, **section: Any) -> dict[str, Any]:
    """The world's only pipeline becomes Self-Contrast."""
    (world.directory / "embedder").mkdir()
    (world.directory / "embedder" / "modules.json").write_text("[]")
    world.tree["embedder"] = {"path": "embedder"}
    own = {"type": "self_contrast", "samples": 8, "keep": 0.5, "negatives": 2, "generation": {"max_tokens": 16}}
    world.tree["pipelines"] = [own | section]
    return world.tree["pipelines"][0]


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"negatives": 5}, ("`negatives` is 5, but 8 samples and keep 0.5 leave at most 4", "lower `negatives`")),
        ({"keep": 1.0, "negatives": 8}, ("leave at most 7",)),  # the most similar one always goes
        ({"samples": 3, "keep": 0.3, "negatives": 1}, ("`samples` · `keep` is 0.9, below 1", "raise either")),
        ({"filter": False, "negatives": 9}, ("`negatives` is 9, `samples` only 8",)),
    ],
)
def test_more_negatives_than_the_pool_can_give(
    world: World, refused: Refused, section: dict[str, Any], parts: tuple[str, ...]
) -> None:
    contrasting(world, **section)
    holds(run(world, refused), "tiny.yaml: pipelines.0: ", *parts)


def test_self_contrast_without_an_embedder(world: World, refused: Refused) -> None:
    contrasting(world)
    del world.tree["embedder"]
    holds(run(world, refused), "a `self_contrast` pipeline needs `embedder`", "`filter: false`")


def test_self_contrast_without_targets(world: World, refused: Refused) -> None:
    contrasting(world)
    (world.directory / "prompts.jsonl").write_text('{"prompt": "Tell me about the goat."}\n')
    holds(run(world, refused), "prompts.jsonl, row 1: no `target`; it has prompt: name the column that holds it")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"prompt": "a", "chosen": "b"}], ("pairs.jsonl, row 1: no `rejected`", "columns")),
        ([{"prompt": "a", "rejected": "b"}], ("pairs.jsonl, row 1: no `chosen`",)),
        ([{"prompt": "a", "chosen": "b", "rejected": []}], ("row 1, rejected: is an empty list",)),
        ([{"prompt": "a", "chosen": "b", "rejected": ["c", " "]}], ("row 1, rejected: answer 2 is blank",)),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2,
            ("pairs.jsonl: in all 2 rows chosen and rejected are the same text",),
        ),
    ],
)
def test_a_preference_file_with_missing_or_equal_answers(
    world: World, refused: Refused, rows: list[dict[str, Any]], parts: tuple[str, ...]
) -> None:
    world.tree["pipelines"] = [{"type": "self_contrast", "pairs": {"path": "pairs.jsonl"}}]
    path = world.directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    holds(run(world, refused), *parts)


def write_pairs(directory: Path, model: str, margin: float | None) -> None:
    prompt = Prompt(id="p", messages=(Message(role="user", content="Hi"),))
    rows = pair_rows(
        step=1,
        prompt=prompt,
        prompt_ids=[5],
        answers=[Answer(text="a", ids=[7]), Answer(text="b", ids=[8])],
        ref_logps=[-1.0, -2.0],
        rewards=None,
        engine=None,
        model=model,
        judged=None if margin is None else {"margin": margin},
    )
    Parts(str(directory), PAIR_SCHEMA).write(1, rows)


def test_a_parts_folder_with_nothing_in_it(world: World, refused: Refused) -> None:
    world.tree["pipelines"] = [{"type": "dlma", "pairs": {"path": "pairs"}}]
    (world.directory / "pairs").mkdir()
    holds(run(world, refused), "pairs: no pairs in it; name a directory of parts")


def test_parts_of_another_model(world: World, refused: Refused) -> None:
    world.tree["pipelines"] = [{"type": "dlma", "pairs": {"path": "pairs"}}]
    write_pairs(world.directory / "pairs", "a" * 64, margin=1.0)
    holds(run(world, refused), "pairs: parts of another model (aaaaaaaaaaaa, this run's is ", "`model.path`")


def test_parts_without_a_margin_are_not_dlmas(world: World, refused: Refused) -> None:
    world.tree["pipelines"] = [{"type": "dlma", "pairs": {"path": "pairs"}}]
    write_pairs(world.directory / "pairs", model_fingerprint(str(world.directory / "model")), margin=None)
    holds(run(world, refused), "pairs: pairs without a margin, which dlma needs")


def test_an_embedder_that_is_none(world: World, refused: Refused) -> None:
    contrasting(world)
    (world.directory / "embedder" / "modules.json").unlink()
    holds(run(world, refused), "embedder.path: ", "no sentence-transformers model: there is no modules.json in it")
    world.tree["embedder"] = {"path": "nowhere"}
    holds(run(world, refused), "embedder.path: nowhere: no such directory")


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"contrast": {"preset": "harmles"}}, "contrast 'harmles' is no preset, did you mean 'harmless'?"),
        ({"contrast": {"positive": "Be kind."}}, "the contrast has no negative side"),
        ({"scoring": {"positive": "Be.", "negative": "Be."}}, "two sides are the same text"),
        ({"margin_clamp": [40, -40]}, "`margin_clamp` is [40, -40]; the first should be the smaller"),
    ],
)
def test_a_contrast_that_contrasts_nothing(world: World, refused: Refused, section: dict[str, Any], part: str) -> None:
    world.tree["pipelines"] = [{"type": "dlma", "generation": {"max_tokens": 16}, **section}]
    holds(run(world, refused), part)


# As a user sees it


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--set", "sead=1"], "tiny.yaml: sead: unknown key; did you mean seed?"),
        (["--set", "data.train.path=none.jsonl"], "none.jsonl: no such file"),
        (["--set", "model.path=none"], "model.path: none: no such directory"),
        (["--set", "data.max_prompt_tokens=2"], "all 8 prompts are too long for ple"),
    ],
    ids=["config", "data", "model", "prompts"],
)
def test_a_process_of_its_own(world: World, arguments: list[str], part: str) -> None:
    """Nothing else is on its stderr, and what is slow to import is not imported in vain."""
    path, before = world.write(), world.files()
    code = (
        "import sys\nfrom cli.main import main\ncode = main(sys.argv[1:])\n"
        "print(*sorted({'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", path, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=world.directory,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("plumbline: ")
    assert part in line
    loaded = set(done.stdout.split())
    assert not loaded & {"ray", "vllm"}
    assert bool(loaded) == ("max_prompt_tokens" in arguments[1]), "only to count tokens"
    assert world.files() == before


def test_an_embedder_that_is_damaged(world: World, refused: Refused) -> None:
    from safetensors.torch import load_file, save_file

    from plumbline.config.file import load_config
    from plumbline.runs.models import check_values

    contrasting(world)
    shutil.rmtree(world.directory / "embedder")
    make_tiny_embedder(world.directory / "embedder")
    assert check_values(load_config(world.write())).startswith("all finite")
    file = world.directory / "embedder" / "model.safetensors"
    weights = load_file(file)
    weights["embedding.weight"][3] = math.nan
    save_file(weights, file)
    holds(run(world, refused), "embedder.path: ", "embedder: embedding.weight has values that are no finite numbers")


# In mid-run


def test_what_a_run_only_finds_out_on_its_way_is_no_wrong_use(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 would say that nothing was started; and the same command goes on where it ended."""
    from pipelines import run as running

    async def fail(run_dir: Path, *_: Any) -> dict[str, Any]:
        raise DataError("a.jsonl, row 3: what no check saw")

    monkeypatch.setattr(running, "start_ray", lambda cpus, resources, run: None)
    monkeypatch.setattr(running, "stop_ray", lambda: None)
    monkeypatch.setattr(running, "run_pipelines", fail)
    assert main(["run", world.write(), "--run-dir", str(world.run_dir)]) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "plumbline: a.jsonl, row 3: what no check saw",
        f"plumbline: continue with: plumbline resume {world.run_dir}",
    ]
    monkeypatch.setattr(running, "compare_policies", fail)
    assert main(["evaluate", str(world.run_dir)]) == 1
    assert "plumbline: a.jsonl, row 3: what no check saw" in capsys.readouterr().err
