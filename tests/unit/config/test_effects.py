"""A key that would do nothing where it stands is refused; where it does something, it passes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from plumbline.config.file import dump_config, parse_config
from plumbline.errors import ConfigError

Tree = dict[str, Any]
FILES = ("train.jsonl", "heldout.jsonl")
PLE: Mapping[str, Any] = {"type": "ple"}
DLMA: Mapping[str, Any] = {"type": "dlma"}
PAIRS = {"pairs": {"path": "runs/a/pairs/dlma"}}
SC: Mapping[str, Any] = {"type": "self_contrast", "filter": False}
GIVEN: Mapping[str, Any] = {"type": "self_contrast", "pairs": {"path": "given.jsonl"}}


def tree(*pipelines: Mapping[str, Any], **rest: Any) -> Tree:
    """A config of nothing but defaults, in which all sections that are there act."""
    methods = any(one["type"] not in ("sft", "reward") for one in pipelines)
    base: Tree = {
        "name": "x",
        "model": {"path": "m"},
        "data": {"train": {"path": FILES[0]}},
        "pipelines": list(pipelines),
    }
    if methods:
        base["reward"] = {"type": "program", "function": "a:b"}
    return base | rest


def heldout(**rest: Any) -> Tree:
    return {"data": {name: {"path": path} for name, path in zip(("train", "heldout"), FILES, strict=True)}, **rest}


IDLE: list[tuple[str, Tree]] = [
    ("evaluation", tree(PLE, evaluation={})),
    ("evaluation", tree({"type": "sft"}, **heldout(evaluation={}))),
    ("evaluation", tree({**DLMA, "train": False}, **heldout(evaluation={}))),
    ("data.heldout", tree(PLE, **heldout())),
    ("data.train.split", tree(PLE, data={"train": {"path": "a.jsonl", "split": "test"}})),
    ("embedder", tree(PLE, embedder={"path": "e"})),
    ("model.revision", tree(PLE, model={"path": "/m", "revision": "v1"})),
    ("model.adapter_revision", tree(PLE, model={"path": "org/m", "adapter_revision": "v1"})),
    ("reward.revision", tree(PLE, reward={"type": "classifier", "path": "/r", "revision": "v1"})),
    ("commits.org/m", tree(PLE, model={"path": "org/m", "revision": "v1"}, commits={"org/m": "0" * 40})),
    ("embedder", tree(SC, embedder={"path": "e"})),
    ("reward", tree({"type": "sft"}, reward={"type": "program", "function": "a:b"})),
    ("sft", tree({"type": "reward"}, sft={})),
    ("sft.learner.keep_versions", tree(PLE, sft={"learner": {"keep_versions": 2}})),
    ("model.max_len", tree({"type": "reward"}, model={"path": "m", "max_len": 64})),
    ("data.max_prompt_tokens", tree({"type": "reward"}, data={"train": {"path": "a"}, "max_prompt_tokens": 9})),
    ("fleet.generator.max_num_seqs", tree({"type": "sft"}, fleet={"generator": {"max_num_seqs": 8}})),
    ("fleet.sync_tolerance", tree({"type": "reward"}, fleet={"sync_tolerance": 0.1})),
    ("fleet.generator.scale_up_after", tree(PLE, fleet={"generator": {"replicas": 2, "scale_up_after": 1}})),
    ("fleet.generator.kv_cache_gib", tree(PLE, fleet={"device": "cuda", "generator": {"kv_cache_gib": 2}})),
    ("fleet.generator.memory_share", tree(PLE, fleet={"device": "cpu", "generator": {"memory_share": 0.5}})),
    ("fleet.generator.kv_cache_gib", tree(PLE, fleet={"engine": "transformers", "generator": {"kv_cache_gib": 2}})),
    ("fleet.scorer.replicas", tree(DLMA, fleet={"scorer": {"replicas": 2}}) | {"reward": None}),
    ("fleet.reference.replicas", tree(PLE, fleet={"reference": {"replicas": 2}})),
    ("fleet.reference.batch_tokens", tree(DLMA, fleet={"reference": {"replicas": "learner", "batch_tokens": 9}})),
    ("serve.gate", tree(PLE, **heldout(evaluation={}), serve={"gate": {}})),
    ("serve.seats", tree(PLE, serve={"seats": 2})),
    ("serve.seats", tree(PLE, serve={"enabled": True, "placement": "replicas", "seats": 2})),
    ("serve.enabled", tree({"type": "sft"}, serve={"enabled": True})),
    ("pipelines.0.share", tree({**PLE, "share": 2})),
    ("pipelines.0.hinge", tree({**PLE, "hinge": 1, "rank_weight": 0})),
    ("pipelines.0.length_normalize_sft", tree({**PLE, "length_normalize_sft": True, "sft_weight": 0})),
    ("pipelines.0.sft_weight", tree({**PLE, "sft_weight": 0, "rank_weight": 0})),
    ("pipelines.0.keep", tree({**SC, "keep": 0.5})),
    ("pipelines.0.samples", tree({**GIVEN, "samples": 4})),
    ("pipelines.0.filter", tree({**GIVEN, "filter": False})),
    ("pipelines.0.generation", tree({**GIVEN, "generation": {"max_tokens": 8}})),
    ("pipelines.1.generation", tree(PLE, {**GIVEN, "generation": {"max_tokens": 8}}, **heldout(evaluation={}))),
    ("pipelines.0.contrast", tree({**DLMA, **PAIRS, "contrast": {"preset": "helpful"}})),
    (
        "pipelines.0.contrast.preset",
        tree({**DLMA, "contrast": {"preset": "helpful", "positive": "a", "negative": "b"}}),
    ),
    ("pipelines.0.pairs.limit", tree({**DLMA, "pairs": {**PAIRS["pairs"], "limit": 4}})),
    ("pipelines.0.sides", tree({**DLMA, **PAIRS, "sides": "plain"})),
    ("pipelines.0.eos_in_margin", tree({**DLMA, **PAIRS, "eos_in_margin": True})),
    ("pipelines.0.learner.lr", tree({**DLMA, "train": False, "learner": {"lr": 0.1}})),
    ("pipelines.0.beta", tree({**DLMA, "train": False, "beta": 0.3})),
    ("pipelines.0.epochs", tree({"type": "raft", "train": False, "epochs": 2})),
    ("pipelines.0.learner.keep_versions", tree({"type": "reward", "learner": {"keep_versions": 2}})),
    ("pipelines.0.learner.keep_versions", tree({"type": "sft", "learner": {"keep_versions": 2}})),
]


@pytest.mark.parametrize(("key", "given"), IDLE, ids=[f"{key}-{i}" for i, (key, _) in enumerate(IDLE)])
def test_a_key_without_effect_is_refused(key: str, given: Tree) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(given, "x.yaml")
    message = str(caught.value)
    assert message.startswith(f"x.yaml: config: `{key}` ") and "\n" not in message


@pytest.mark.parametrize(
    "given",
    [
        tree(PLE, **heldout(evaluation={})),
        tree({"type": "reward"}, **heldout()),
        tree({"type": "sft"}, sft={"name": "base0"}),
        tree({"type": "sft", "policy": {"type": "lora"}, "learner": {"keep_versions": 2}}),
        tree(PLE, data={"train": {"path": "org/set", "split": "test"}}),
        tree({"type": "self_contrast"}, embedder={"path": "e"}),
        tree(PLE, {**DLMA, "share": 2}),
        tree({**PLE, "share": 2}, **heldout(evaluation={}), serve={"enabled": True, "gate": {}}),
        tree({**GIVEN, "negatives": 1, "generation": {"max_tokens": 8}}, **heldout(evaluation={})),
        tree({**DLMA, "train": False, "ahead": 2}),
        tree(PLE, model={"path": "org/m", "revision": "v1"}, commits={"org/m@v1": "0" * 40}),
        tree(PLE, fleet={"generator": {"replicas": [1, 2], "scale_up_after": 1}}),
        tree(PLE, serve={"replicas": 2, "resources": {"big": 1}, "pinned": 2}),  # `plumbline serve` reads them
    ],
)
def test_a_key_that_acts_passes_and_so_does_the_config_that_a_run_keeps(given: Tree, tmp_path: Path) -> None:
    config = parse_config(given, "x.yaml")
    assert parse_config(yaml.safe_load(dump_config(config)), "kept") == config


def chance(*pipelines: Mapping[str, Any], **rest: Any) -> Tree:
    return tree(*pipelines, deterministic=True, **rest)


JUDGE = {"type": "judge", "url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "Be kind."}
FUNCTION = {"type": "program", "function": "a:b"}
LEFT_TO_CHANCE: list[tuple[str, Tree]] = [
    ("fleet.generator.replicas", chance(PLE, fleet={"generator": {"replicas": 2}})),
    ("fleet.generator.replicas", chance(PLE, fleet={"generator": {"replicas": [1, 2]}})),
    ("fleet.reference.cache", chance(DLMA, fleet={"reference": {"cache": "c"}})),
    ("serve.enabled", chance(PLE, serve={"enabled": True})),
    ("reward.url", chance(PLE, reward=JUDGE)),
    ("reward.of.1.reward.url", chance(PLE, reward={"type": "sum", "of": [{"reward": FUNCTION}, {"reward": JUDGE}]})),
    ("evaluation.judge.url", chance(PLE, **heldout(evaluation={"judge": JUDGE}))),
    ("pipelines.2", chance(PLE, {"type": "sft"}, DLMA)),
    ("pipelines.0.learner.workers", chance({**PLE, "learner": {"workers": 2}})),
    ("pipelines.0.learner.workers", chance({**PLE, "learner": {"workers": [1, 2]}})),
    ("sft.learner.strategy", chance(PLE, sft={"learner": {"strategy": "deepspeed"}})),
    ("pipelines.0.generation.stop", chance({**PLE, "generation": {"stop": ["."]}})),
    ("pipelines.0.max_staleness", chance({**PLE, "max_staleness": 2})),
    ("pipelines.0.ahead", chance({**DLMA, "ahead": 2})),
]


@pytest.mark.parametrize(
    ("key", "given"), LEFT_TO_CHANCE, ids=[f"{key}-{i}" for i, (key, _) in enumerate(LEFT_TO_CHANCE)]
)
def test_a_deterministic_run_refuses_what_leaves_something_to_chance(key: str, given: Tree) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(given, "x.yaml")
    message = str(caught.value)
    assert message.startswith(f"x.yaml: config: `{key}` ") and "\n" not in message
    parse_config(given | {"deterministic": False}, "x.yaml")


@pytest.mark.parametrize(
    "given",
    [
        chance(PLE, {"type": "sft"}, fleet={"generator": {"replicas": 1}}),
        chance({**PLE, "max_staleness": 0}, sft={}),
        chance({**DLMA, "ahead": 1}),
        chance({**PLE, "generation": {"stop": ["."]}}, fleet={"engine": "transformers"}),
    ],
)
def test_what_can_be_deterministic_passes(given: Tree) -> None:
    parse_config(given, "x.yaml")
