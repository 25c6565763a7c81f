"""The configuration: the shipped files, overrides, and what every wrong key or value is answered with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from plumbline.config.data import ClassifierReward, reward_parts
from plumbline.config.file import dump_config, load_config, parse_config
from plumbline.config.hub import at_directories, hub_models, is_hub_name
from plumbline.config.learner import FullPolicy, LoraPolicy
from plumbline.config.pipelines import Ple, RewardModel, Sft
from plumbline.config.section import bounds, planned
from plumbline.config.tree import Config
from plumbline.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TREE: Mapping[str, Any] = {
    "name": "tiny",
    "model": {"path": "model"},
    "data": {"train": {"path": "prompts.jsonl"}, "heldout": {"path": "heldout.jsonl"}},
    "reward": {"type": "program", "function": "rewards:score"},
    "pipelines": [{"type": "ple"}, {"type": "sft", "policy": {"type": "lora"}}, {"type": "reward"}],
    "evaluation": {"judge": {"type": "classifier", "path": "judge"}},
}


def parse(**changes: Any) -> Config:
    return parse_config({**TREE, **changes}, origin="tiny.yaml")


def written(directory: Path, tree: Any = TREE) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def refusal(tree: Mapping[str, Any]) -> str:
    """The one line that a tree is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, origin="tiny.yaml")
    message = str(caught.value)
    assert message.startswith("tiny.yaml: ")
    assert "\n" not in message
    return message.removeprefix("tiny.yaml: ")


# Good forms


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_loads_and_is_the_same_after_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    kept = tmp_path / "config.yaml"
    kept.write_text(dump_config(config), encoding="utf-8")
    assert load_config(kept) == config


def test_there_are_shipped_configs() -> None:
    assert "quickstart.yaml" in {path.name for path in CONFIGS.glob("*.yaml")}


def test_a_round_trip_keeps_what_defaults_do_not_say(tmp_path: Path) -> None:
    config = parse(
        model={"init": {"model_type": "llama", "rope_scaling": None}, "tokenizer": "tokenizer"},
        sft={"epochs": 3},
        pipelines=[{"type": "ple", "hinge": 0.5, "principle": "Sei höflich: immer.", "tau0": 0}],
    )
    kept = tmp_path / "config.yaml"
    kept.write_text(dump_config(config), encoding="utf-8")
    assert load_config(kept) == config
    assert "höflich" in kept.read_text("utf-8")


def test_defaults_are_the_papers() -> None:
    ple = parse().pipelines[0]
    assert isinstance(ple, Ple)
    assert (ple.tau0, ple.alpha, ple.replay_window, ple.hinge, ple.length_normalize_sft) == (
        0.2,
        0.9,
        None,
        None,
        False,
    )
    assert ple.policy == LoraPolicy(r=8, alpha=16)
    assert (ple.learner.batch_size, ple.max_staleness) == (64, 1)


def test_unions_are_told_apart_by_their_type() -> None:
    ple, sft, reward = parse().pipelines
    assert (type(ple), type(sft), type(reward)) == (Ple, Sft, RewardModel)
    assert isinstance(sft, Sft) and isinstance(sft.policy, LoraPolicy)
    assert Sft().policy == FullPolicy(type="full")


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = parse(
        model={"path": "model", "chat_template": "chatml"},
        data={"train": {"path": "org/dataset"}, "heldout": {"path": "./held.jsonl"}},
    )
    assert config.model.path == str(tmp_path / "model")
    assert config.model.chat_template == "chatml"
    assert config.data.train.path == "org/dataset"
    assert config.data.heldout is not None
    assert config.data.heldout.path == str(tmp_path / "held.jsonl")


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().seed = 3  # type: ignore[misc]


# Overrides


def test_overrides_reach_sections_lists_and_what_the_file_leaves_out(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path),
        ["fleet.generator.replicas=2", "pipelines.1.learner.lr=1e-3", "seed=7", "pipelines.0.generation.stop=[END]"],
    )
    assert config.fleet.generator.replicas == 2
    assert config.pipelines[1].learner.lr == 0.001
    assert config.seed == 7
    assert isinstance(config.pipelines[0], Ple)
    assert config.pipelines[0].generation.stop == ["END"]


@pytest.mark.parametrize(
    ("given", "least", "most"), [("3", 3, 3), ("[1, 4]", 1, 4), ("[0, 2]", 0, 2), ("[2, 2]", 2, 2)]
)
def test_a_number_of_generators_or_its_bounds(tmp_path: Path, given: str, least: int, most: int) -> None:
    config = load_config(written(tmp_path), [f"fleet.generator.replicas={given}"])
    assert bounds(planned(config.fleet.generator.replicas)) == (least, most)
    kept = tmp_path / "kept.yaml"
    kept.write_text(dump_config(config))
    assert load_config(kept) == config, "a resumed run has the same"


@pytest.mark.parametrize("given", ["0", "[0, 0]", "[4, 1]", "[1]", "[1, 2, 3]", "[-1, 2]", "many", "1.5", "true"])
@pytest.mark.parametrize("key", ["fleet.generator.replicas", "pipelines.0.learner.workers"])
def test_what_is_neither_a_number_nor_its_bounds(tmp_path: Path, key: str, given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path), [f"{key}={given}"])
    line = str(caught.value)
    assert (
        f"{key}: should be a count of 1 or more, or its bounds, such as [1, 4], got {yaml.safe_load(given)!r}" in line
    )


def test_a_learner_has_a_worker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`workers` is \[0, 2\]; a learner has at least one worker"):
        load_config(written(tmp_path), ["pipelines.0.learner.workers=[0, 2]"])


def test_generators_that_answer_users_are_never_none(tmp_path: Path) -> None:
    sets = ["fleet.generator.replicas=[0, 2]", "serve.enabled=true"]
    with pytest.raises(ConfigError, match="let its lower bound be 1"):
        load_config(written(tmp_path), sets)
    assert load_config(written(tmp_path), [*sets, "serve.placement=replicas"]).serve.enabled


def test_an_override_can_take_a_section_away(tmp_path: Path) -> None:
    assert load_config(written(tmp_path), ["evaluation="]).evaluation is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed", ["write KEY=VALUE", "--set fleet.generator.replicas=2"]),
        ("=3", ["write KEY=VALUE"]),
        ("fleet=3", ["fleet: should be a mapping of keys, got 3"]),
        ("name.first=3", ["name holds a value, not a section"]),
        ("pipelines.3.steps=3", ["'3' is no position in a list of 3", "0, 1"]),
        ("pipelines.ple.steps=3", ["'ple' is no position in a list of 3"]),
        ("pipelines.-1.steps=3", ["'-1' is no position in a list of 3"]),
        ("name=[", ["'[' is no YAML value", "quote"]),
        ("sed=3", ["sed: unknown key; did you mean seed?"]),
        ("pipelines.0.step=3", ["pipelines.0.step: unknown key; did you mean steps?"]),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, parts: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path), [override])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# Unknown keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sead": 1}, "sead: unknown key; did you mean seed?"),
        ({"model": {"path": "m", "maxlen": 8}}, "model.maxlen: unknown key; did you mean max_len?"),
        ({"model": {"pth": "m"}}, "model.pth: unknown key; did you mean path?"),
        (
            {"data": {"train": {"file": "a"}}},
            "data.train.file: unknown key; known are path, split, columns, where, limit, note",
        ),
        (
            {"fleet": {"generator": {"replica": 2}}},
            "fleet.generator.replica: unknown key; did you mean replicas?",
        ),
        ({"reward": {"type": "program", "func": "a:b"}}, "reward.func: unknown key; did you mean function?"),
        (
            {"reward": {"type": "classifier", "path": "a", "batch_token": 8}},
            "reward.batch_token: unknown key; did you mean batch_tokens?",
        ),
        ({"pipelines": [{"type": "ple", "stepz": 8}]}, "pipelines.0.stepz: unknown key; did you mean steps?"),
        (
            {"pipelines": [{"type": "ple", "generation": {"temprature": 1}}]},
            "pipelines.0.generation.temprature: unknown key; did you mean temperature?",
        ),
        (
            {"pipelines": [{"type": "ple"}, {"type": "sft", "learner": {"batchsize": 8}}]},
            "pipelines.1.learner.batchsize: unknown key; did you mean batch_size?",
        ),
        (
            {"pipelines": [{"type": "sft", "policy": {"type": "lora", "alfa": 8}}]},
            "pipelines.0.policy.alfa: unknown key; did you mean alpha?",
        ),
        (
            {"evaluation": {"judge": {"type": "program", "functions": "a:b"}}},
            "evaluation.judge.functions: unknown key; did you mean function?",
        ),
        ({"sft": {"epoch": 2}}, "sft.epoch: unknown key; did you mean epochs?"),
    ],
)
def test_an_unknown_key_gets_the_nearest_name_of_its_own_section(change: Mapping[str, Any], message: str) -> None:
    assert refusal({**TREE, **change}) == message


def test_a_kinds_own_keys_are_suggested_not_its_siblings() -> None:
    assert refusal({**TREE, "pipelines": [{"type": "sft", "rank_weigh": 1}]}).endswith(
        "known are name, learner, type, epochs, policy"
    )


def test_a_key_that_is_no_text() -> None:
    tree: dict[Any, Any] = {**TREE, 1: "a"}
    assert refusal(tree) == "1: keys should be strings, got 1"


def test_a_misspelling_is_named_before_what_it_leaves_missing() -> None:
    assert refusal({**TREE, "data": {"tran": {"path": "a"}}}) == "data.tran: unknown key; did you mean train?"


# Unknown kinds, missing keys, wrong types, bounds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pipelines": [{"type": "pel"}]},
            "pipelines.0.type: 'pel' is unknown; known are 'ple', 'dlma', 'self_contrast', 'raft', 'sft', 'reward'",
        ),
        ({"pipelines": [{"name": "a"}]}, "pipelines.0.type: missing; say which kind this is"),
        (
            {"pipelines": [{"type": "sft", "policy": {"type": "lorra"}}]},
            "pipelines.0.policy.type: 'lorra' is unknown; known are 'lora', 'full'",
        ),
        (
            {"reward": {"type": "human"}},
            "reward.type: 'human' is unknown; known are 'classifier', 'program', 'http', 'judge', 'sum'",
        ),
        (
            {"evaluation": {"judge": {"path": "a"}}},
            "evaluation.judge.type: missing; say which kind this is",
        ),
        ({"data": {"train": {}}}, "data.train.path: missing; this key is required"),
        ({"model": "runs/model"}, "model: should be a mapping of keys, got 'runs/model'"),
        ({"pipelines": []}, "pipelines: list should have at least 1 item after validation, not 0"),
        (
            {"pipelines": [{"type": "ple", "steps": "many"}]},
            "pipelines.0.steps: input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        (
            {"pipelines": [{"type": "ple", "alpha": 1.5}]},
            "pipelines.0.alpha: input should be less than or equal to 1, got 1.5",
        ),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, got -1"),
        (
            {"fleet": {"engine": "sglang"}},
            "fleet.engine: input should be 'auto', 'vllm' or 'transformers', got 'sglang'",
        ),
        (
            {"name": "../a"},
            "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9_.-]*$', got '../a'",
        ),
        (
            {"reward": {"type": "program", "function": "rewards.score"}},
            r"reward.function: string should match pattern '^[\w.]+:\w+$', got 'rewards.score'",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(change: Mapping[str, Any], message: str) -> None:
    assert refusal({**TREE, **change}) == message


# Rules between keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "model: give exactly one of `path` (a model directory) and `init` (a config, random weights)"),
        (
            {"model": {"path": "m", "init": {"model_type": "llama"}}},
            "model: give exactly one of `path` (a model directory) and `init` (a config, random weights)",
        ),
        (
            {"model": {"init": {"model_type": "llama"}}},
            "model: `init` needs `model_type` in it and `tokenizer` beside it",
        ),
        (
            {"model": {"init": {"hidden_size": 8}, "tokenizer": "t"}},
            "model: `init` needs `model_type` in it and `tokenizer` beside it",
        ),
        (
            {"pipelines": [{"type": "ple"}, {"type": "ple"}]},
            "config: two pipelines are named 'ple'; give each a `name` of its own",
        ),
        (
            {"sft": {}},
            "config: two pipelines are named 'sft'; give each a `name` of its own",
        ),
        ({"reward": None}, "config: a `ple` pipeline needs `reward` (type: classifier, program, http, judge or sum)"),
        (
            {"model": {"init": {"model_type": "llama"}, "tokenizer": "t"}},
            "config: a `ple` pipeline cannot start from random weights; add `sft`, or give `model.path`",
        ),
    ],
)
def test_keys_that_do_not_go_together(change: Mapping[str, Any], message: str) -> None:
    assert refusal({**TREE, **change}) == message


def test_random_weights_and_sft_go_together() -> None:
    config = parse(
        model={"init": {"model_type": "llama"}, "tokenizer": "t"}, sft={"name": "start"}, pipelines=[{"type": "ple"}]
    )
    assert config.model.tokenizer_path == "t"


# Files


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["a config is a mapping of keys", "NoneType"]),
        (b"- a\n- b\n", ["a config is a mapping of keys", "list"]),
        (b"name: [a\n", ["not YAML", "line 2"]),
        (b"name: a\n\tseed: 1\n", ["not YAML", "line 2"]),
        ("name: é\n".encode("latin-1"), ["not a text file", "UTF-8"]),
    ],
)
def test_a_file_that_holds_no_config(tmp_path: Path, content: bytes, parts: Sequence[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    for part in ("bad.yaml: ", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("none.yaml", "no such file; name a YAML config"),
        (".", "not a text file"),
        ("file/config.yaml", "cannot be read (Not a directory)"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^" + str(tmp_path)) as caught:
        load_config(tmp_path / name)
    assert part in str(caught.value)


def test_how_many_versions_stay_on_disk() -> None:
    def kept(**keys: object) -> int | None:
        return Ple.model_validate({"type": "ple", **keys}).keep_versions

    assert kept() is None, "adapters are small"
    assert kept(policy={"type": "full"}) == 3
    assert kept(policy={"type": "full"}, learner={"keep_versions": 7}) == kept(learner={"keep_versions": 7}) == 7


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"gpus": 1.5}, "fleet.generator.gpus: should be auto, a share of one below 1, or a whole number"),
        (
            {"vllm": {"max_model_len": 9}},
            "fleet.generator.vllm: `max_model_len` is not for this key: give `model.max_len`",
        ),
        ({"vllm": {"tensor_parallel_size": 2}}, "an engine's model is cut over its GPUs: `fleet.generator.gpus`"),
        ({"vllm": {"gpu_memory_utilization": 0.5}}, "give `fleet.generator.memory_share`"),
        ({"vllm": {"trust_remote_code": True}}, "`trust_remote_code` would run a model's own code"),
        ({"vllm": {"speculative_config": {"trust_remote_code": True}}}, "`trust_remote_code` would run a model's own"),
        ({"vllm": {"load_format": "pt"}}, "`load_format: pt` does not read safetensors alone; known are safetensors"),
        ({"vllm": {"load_format": "auto"}}, "`load_format: auto` does not read safetensors alone"),
        ({"vllm": {"worker_cls": "a.B"}}, "Plumbline runs vLLM's own code alone"),
        ({"vllm": ["quantization"]}, "fleet.generator.vllm: should be a mapping of keys"),
    ],
)
def test_what_generators_may_not_be_told(generator: Mapping[str, Any], message: str) -> None:
    said = refusal({**TREE, "fleet": {"generator": generator}})
    assert message in said and "\n" not in said


@pytest.mark.parametrize("generator", [{"vllm": {"quantization": "fp8"}}, {"gpus": 2}])
def test_what_is_vllms_alone_is_refused_beside_transformers(generator: Mapping[str, Any]) -> None:
    assert "transformers" in refusal({**TREE, "fleet": {"engine": "transformers", "generator": generator}})


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 2, 8])
def test_gpus_of_an_engine_are_a_share_or_a_whole_number(gpus: float) -> None:
    assert parse_config({**TREE, "fleet": {"generator": {"gpus": gpus}}}, "here").fleet.generator.gpus == gpus


@pytest.mark.parametrize(
    ("policy", "learner", "kept"),
    [
        ("lora", {}, None),
        ("lora", {"checkpoint_every": 4}, None),
        ("lora", {"keep_versions": 2, "checkpoint_every": 4}, 4),
        ("lora", {"keep_versions": 5, "checkpoint_every": 4}, 5),
        ("full", {}, 3),
        ("full", {"checkpoint_every": 4}, 4),
    ],
)
def test_versions_since_a_checkpoint_stay(policy: str, learner: Mapping[str, Any], kept: int | None) -> None:
    section = Ple.model_validate({"type": "ple", "policy": {"type": policy}, "learner": learner})
    assert section.keep_versions == kept


def test_a_runs_own_model_keeps_its_tokenizer_and_what_was_made_of_it_has_one(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), ["model.path=/base", "model.tokenizer=/words", "model.adapter=/lora"])
    own, made = config.model.at("/base"), config.model.at("/merged")
    assert (own.path, own.tokenizer, own.adapter) == ("/base", "/words", None)
    assert (made.path, made.tokenizer, made.adapter) == ("/merged", None, None)


# Several rewards as a sum

POLITE = {"reward": {"type": "classifier", "path": "polite"}}
SHORT = {"reward": {"type": "program", "function": "rewards:short"}, "weight": -0.25, "name": "short"}


def summed(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "sum", "of": list(parts)}


def test_parts_of_a_sum_are_named_by_their_type_and_each_has_its_key(tmp_path: Path) -> None:
    config = parse(reward=summed(POLITE, SHORT))
    parts = reward_parts(config.reward, "reward")
    assert [(key, part.name, part.weight) for key, part in parts.items()] == [
        ("reward.of.0.reward", "classifier", 1.0),
        ("reward.of.1.reward", "short", -0.25),
    ]
    assert list(config.rewards) == [*parts, "evaluation.judge"]
    kept = tmp_path / "config.yaml"
    kept.write_text(dump_config(config), encoding="utf-8")
    assert load_config(kept) == config
    assert list(parse(evaluation={"judge": summed(SHORT)}).rewards) == ["reward", "evaluation.judge.of.0.reward"]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (SHORT | {"weight": 0}, "reward.of.1.weight: a part of weight 0 is asked for nothing; give another number, or"),
        (SHORT | {"weight": float("nan")}, "reward.of.1.weight: should be a finite number, got nan"),
        (SHORT | {"weight": float("inf")}, "reward.of.1.weight: should be a finite number, got inf"),
        (SHORT | {"weight": "much"}, "reward.of.1.weight: input should be a valid number"),
        (SHORT | {"wieght": 1}, "reward.of.1.wieght: unknown key; did you mean weight?"),
        (SHORT | {"name": "a/b"}, "reward.of.1.name: string should match pattern"),
        (POLITE, "reward: two parts are named 'classifier'; give each a `name` of its own"),
        ({"reward": summed(SHORT)}, "reward.of.1.reward.type: 'sum' is unknown; known are 'classifier', 'program',"),
        ({"reward": {"type": "classifier"}}, "reward.of.1.reward.path: missing; this key is required"),
        ({"weight": 1}, "reward.of.1.reward: missing; this key is required"),
    ],
)
def test_a_bad_part_of_a_sum_is_named_by_its_key(part: Mapping[str, Any], expected: str) -> None:
    assert refusal({**TREE, "reward": summed(POLITE, part)}).startswith(expected)


def test_a_sum_of_nothing_is_none() -> None:
    assert refusal({**TREE, "reward": summed()}).startswith("reward.of: list should have at least 1 item")


def test_models_of_a_sum_may_be_named_by_the_hub() -> None:
    named = {"type": "classifier", "path": "org/reward", "revision": "v2"}
    config = parse(reward=summed(SHORT, {"reward": named}))
    assert [(one.key, one.label) for one in hub_models(config)] == [("reward.of.1.reward.path", "org/reward@v2")]
    there = at_directories(config, {"reward.of.1.reward.path": "/cache/reward"})
    assert hub_models(there) == []
    reward = there.rewards["reward.of.1.reward"]
    assert isinstance(reward, ClassifierReward) and (reward.path, reward.revision) == ("/cache/reward", None)
    assert there.rewards["reward.of.0.reward"] == config.rewards["reward.of.0.reward"]


def test_a_gguf_file_is_no_hub_name() -> None:
    names = ("models/foo.gguf", "org/foo-gguf", "org/foo.gguf-1")
    assert [is_hub_name(name) for name in names] == [False, True, True]
    model = {"path": "models/foo.gguf", "revision": "v1"}
    assert refusal({**TREE, "model": model}) == (
        "config: `model.revision` is of a model of the hub, and `path` is no such name (ORG/MODEL); leave it out"
    )
