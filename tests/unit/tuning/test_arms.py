"""Which arms there are, and the config that runs them side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plumbline.config.file import load_config, parse_config, parse_text
from plumbline.config.tree import Config
from plumbline.errors import ConfigError, UserError
from plumbline.tuning.arms import (
    GENERATES,
    MOST_ARMS,
    Tuned,
    TuningData,
    arms_of,
    base_config,
    check_over,
    draw_config,
    draws,
    parse_over,
    rates,
    rung_config,
    shown,
    tuned_pipelines,
    with_values,
)

ROOT = Path(__file__).resolve().parents[3]
DATA = TuningData(heldout=Path("/t/heldout.jsonl"), prompts=40, train=Path("/t/train.jsonl"))


def config(*pipelines: dict[str, Any], **keys: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "one",
        "model": {"path": "m"},
        "data": {"train": {"path": "t.jsonl"}, "heldout": {"path": "h.jsonl"}},
        "reward": {"type": "program", "function": "a:b"},
        "pipelines": list(pipelines),
        "evaluation": {"prompts": 64},
        **keys,
    }
    return parse_config(tree, "one.yaml")


def tuned(read: Config, place: int = 0) -> Tuned:
    return tuned_pipelines(read, [read.pipelines[place].name], "one.yaml")[0]


def of_rung(read: Config, place: int = 0, *, steps: int = 4, full: int = 16, base: str | None = None) -> Config:
    section = tuned(read, place)
    return rung_config(read, section, arms_of(section, {}), steps, full, DATA, base)


def test_seven_rates_half_a_decade_apart_have_the_configs_in_the_middle() -> None:
    assert rates(1e-4) == [3.2e-6, 1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3]
    assert rates(0.5) == [0.016, 0.05, 0.16, 0.5], "none is above what `lr` may be"


def test_a_number_is_shown_as_short_as_it_reads_back() -> None:
    for value, text in (
        (1e-3, "1e-3"),
        (3.2e-4, "3.2e-4"),
        (0.05, "0.05"),
        (1.0, "1"),
        (1.25e-5, "1.25e-5"),
        (1e11, "1e11"),
    ):
        assert shown(value) == text
        assert float(text) == value


def test_over_gives_the_values_and_their_combinations_are_the_arms() -> None:
    over = parse_over(["lr=1e-3,1e-4", "beta=0.1,0.05", "tau0=0.2"])
    assert over == {"lr": [1e-4, 1e-3], "beta": [0.05, 0.1], "tau0": [0.2]}
    read = config({"type": "dlma"}, {"type": "ple"})
    assert [(a.name, dict(a.values)) for a in arms_of(tuned(read), over)] == [
        ("dlma-lr-1e-4-beta-0.05", {"lr": 1e-4, "beta": 0.05}),
        ("dlma-lr-1e-4-beta-0.1", {"lr": 1e-4, "beta": 0.1}),
        ("dlma-lr-1e-3-beta-0.05", {"lr": 1e-3, "beta": 0.05}),
        ("dlma-lr-1e-3-beta-0.1", {"lr": 1e-3, "beta": 0.1}),
    ]
    assert [a.name for a in arms_of(tuned(read, 1), over)] == ["ple-lr-1e-4-tau0-0.2", "ple-lr-1e-3-tau0-0.2"]


def test_a_long_name_leaves_room_for_what_tells_arms_apart() -> None:
    names = [arm.name for arm in arms_of(tuned(config({"type": "ple", "name": "p" * 64})), {})]
    assert len(set(names)) == 7
    assert max(map(len, names)) == 64
    assert names[0].endswith("-lr-3.2e-6")


@pytest.mark.parametrize("text", ["lr", "lr=", "lr=fast", "lr=0,1e-3", "lr=-1", "lr=nan", "rate=1e-3", "lr=1e-3,"])
def test_what_over_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match="write KEY=VALUE"):
        parse_over([text])


def test_over_of_too_few_or_too_many_or_of_no_pipeline() -> None:
    read = config({"type": "ple"})
    with pytest.raises(UserError, match="lr is there twice"):
        parse_over(["lr=1e-3", "lr=1e-4"])
    with pytest.raises(UserError, match="1 of lr of ple should be 2 to 16"):
        arms_of(tuned(read), {"lr": [1e-3]})
    with pytest.raises(UserError, match="7 of lr x 3 of tau0"):
        arms_of(tuned(read), {"tau0": [0.1, 0.2, 0.3]})
    with pytest.raises(UserError, match="no `beta` in ple"):
        check_over({"beta": [0.1]}, [tuned(read)])
    check_over({"beta": [0.1]}, [tuned(read), tuned(config({"type": "dlma"}))])
    assert MOST_ARMS >= 14, "two betas beside the default rates"


def test_which_pipelines_are_tuned() -> None:
    full, parts = {"type": "raft", "policy": {"type": "full"}}, {"type": "dlma", "train": False}
    read = config({"type": "ple"}, parts, {"type": "sft", "policy": {"type": "lora"}}, {"type": "reward"})
    assert [one.name for one in tuned_pipelines(read, [], "x")] == ["ple", "sft"]
    for name, why in (
        ("dlma", "only makes parts"),
        ("reward", "reward model"),
        ("pel", "has no such pipeline; it has ple"),
    ):
        with pytest.raises(UserError, match=why):
            tuned_pipelines(read, [name], "x")
    with pytest.raises(ConfigError, match="all of its weights"):
        tuned_pipelines(config(full), [], "x")


def test_a_rung_has_the_arms_alone_and_nothing_that_is_for_the_whole_run() -> None:
    ple = {"type": "ple", "steps": 16, "learner": {"lr": 1e-3, "warmup": 8, "schedule": "cosine"}, "share": 2}
    embeds = {"type": "self_contrast", "generation": {"max_tokens": 9}}
    read = config(
        ple,
        embeds,
        embedder={"path": "e"},
        fleet={"reference": {"replicas": 1}},
        serve={"enabled": True, "gate": {"every": 2}},
        tracking={"mlflow": {"uri": "http://x"}},
        storage_path="/s",
        evaluation={"prompts": 64, "judge": {"type": "program", "function": "c:d"}},
    )
    made = of_rung(read)
    assert [p.name for p in made.pipelines] == [arm.name for arm in arms_of(tuned(read), {})]
    assert [p.learner.lr for p in made.pipelines] == rates(1e-3)
    assert {(p.learner.warmup, p.learner.schedule) for p in made.pipelines} == {(2, "cosine")}
    assert {p.steps for p in made.methods} == {4}
    assert made.data.heldout is not None and made.data.heldout.path == "/t/heldout.jsonl"
    assert made.evaluation is not None
    assert (made.evaluation.prompts, made.evaluation.judge) == (40, None)
    assert not made.serve.enabled and made.storage_path is None and made.tracking.mlflow is None
    assert made.embedder is None
    assert of_rung(read, 1).embedder is not None


def test_the_arms_of_given_pairs_are_asked_as_the_config_says() -> None:
    generation = {"max_tokens": 9}
    pairs = {"type": "self_contrast", "pairs": {"path": "p.jsonl"}, "negatives": 1, "generation": generation}
    made = of_rung(config(pairs))
    assert made.evaluation is not None and made.evaluation.generation is not None
    assert made.evaluation.generation.max_tokens == 9


def test_what_is_drawn_for_all_arms_has_what_draws_and_they_have_what_learns() -> None:
    drawing = {"samples": 8, "keep": 0.5, "negatives": 2, "generation": {"max_tokens": 9}}
    learning = {"beta": 0.2, "epochs": 2, "learner": {"lr": 1e-3}}
    read = config({"type": "self_contrast", **drawing, **learning}, embedder={"path": "e"})
    section = tuned(read)
    assert draws(section)
    drawn = draw_config(read, section, 4, DATA, None)
    assert [one.model_dump(exclude_unset=True) for one in drawn.pipelines] == [
        {"type": "self_contrast", **drawing, "steps": 4, "train": False}
    ]
    assert drawn.embedder and drawn.evaluation is None
    arms = rung_config(read, section, arms_of(section, {}), 4, 16, DATA, None, Path("/t/pairs"))
    assert arms.embedder is None
    for one in arms.methods:
        given = one.model_dump(exclude_unset=True)
        assert given["pairs"] == {"path": "/t/pairs"} and given["beta"] == 0.2 and given["negatives"] == 2
        assert not {"samples", "keep", "generation"} & set(given)
    both = config({"type": "self_contrast", **drawing}, {"type": "dlma"}, embedder={"path": "e"})
    assert draw_config(both, tuned(both, 1), 4, DATA, None).embedder is None
    assert not draws(tuned(config({"type": "dlma", "pairs": {"path": "p"}})))
    assert not draws(tuned(config({"type": "ple"})))
    assert not draws(tuned(config({"type": "dlma", "learner": {"quantize": "nf4"}}))), "no learner, no quantised π0"


def test_all_arms_draw_the_same_prompts_by_the_same_seeds() -> None:
    assert {one.draws_as for one in of_rung(config({"type": "ple"})).methods} == {"ple"}
    assert {one.draws_as for one in of_rung(config({"type": "ple", "draws_as": "raft"})).methods} == {"raft"}


def test_no_learner_is_asked_for_log_probs_where_pairs_are_only_drawn() -> None:
    read = config({"type": "dlma"}, fleet={"reference": {"replicas": "learner"}})
    made = draw_config(read, tuned(read), 4, DATA, None)
    assert made.fleet.reference.replicas == "auto"
    assert of_rung(read).fleet.reference.replicas == "learner"


def test_rows_that_are_judged_on_are_learnt_from_by_no_run() -> None:
    aside = replace(DATA, aside=True)
    read = config({"type": "dlma"}, sft={})
    section = tuned(read)
    runs = [
        base_config(read, aside),
        draw_config(read, section, 4, aside, None),
        rung_config(read, section, arms_of(section, {}), 4, 16, aside, None),
    ]
    assert [run.data.train.path for run in runs] == ["/t/train.jsonl"] * 3
    assert of_rung(read).data.train.path == "t.jsonl"


def test_of_the_hub_only_what_a_rung_still_has_keeps_its_commit() -> None:
    commits = {"org/m@v1": "a" * 40, "org/e": "b" * 40}
    model = {"path": "org/m", "revision": "v1"}
    read = config({"type": "ple"}, {"type": "self_contrast"}, model=model, embedder={"path": "org/e"}, commits=commits)
    assert of_rung(read).commits == {"org/m@v1": "a" * 40}
    assert of_rung(read, 1).commits == commits
    made = of_rung(read, base="/t/base/policies/sft/v000001")
    assert (made.model.revision, made.commits) == (None, {})


def test_an_sft_is_cut_from_a_shuffled_file_and_has_generators_beside_it() -> None:
    sft = {"type": "sft", "policy": {"type": "lora"}, "learner": {"batch_size": 10}, "epochs": 2}
    made = of_rung(config({"type": "ple", "generation": {"max_tokens": 9}}, sft), 1)
    assert (made.data.train.path, made.data.train.limit) == ("/t/train.jsonl", 40)
    [asks] = made.methods
    assert asks.name == GENERATES and asks.generation.max_tokens == 9
    assert [p.name for p in made.served if p.name != GENERATES] == [f"sft-lr-{shown(r)}" for r in rates(1e-4)]


def test_all_rungs_start_from_the_base_that_a_run_of_its_own_made() -> None:
    model = {"init": {"model_type": "llama"}, "tokenizer": "k"}
    read = config({"type": "self_contrast"}, model=model, embedder={"path": "e"}, sft={"epochs": 2})
    first = base_config(read, DATA)
    assert first.sft == read.sft and first.data.train == read.data.train
    assert first.evaluation is None and first.embedder is None
    assert [one.name for one in first.pipelines] == [GENERATES] and not first.pipelines[0].trains
    made = of_rung(read, base="/t/base/policies/sft/v000001")
    assert made.sft is None
    assert made.model.path == "/t/base/policies/sft/v000001" and made.model.init is None


def test_a_value_out_of_its_bounds_is_told_by_its_key() -> None:
    section = tuned(config({"type": "ple"}))
    arms = arms_of(section, {"lr": [1e-3, 2.0]})
    with pytest.raises(ConfigError, match=r"learner\.lr: input should be less than or equal to 1, got 2\.0"):
        rung_config(config({"type": "ple"}), section, arms, 1, 1, DATA, None)


def test_every_shipped_config_that_can_be_judged_has_rungs() -> None:
    """Nothing that a config gives may be without effect in a rung, which would be refused."""
    shipped = [load_config(path) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    judged = [read for read in shipped if read.evaluation and read.reward]
    sections = [(read, section) for read in judged for section in tuned_pipelines(read, [], "x")]
    made = [
        rung_config(
            read, section, arms_of(section, {}), 4, 16, DATA, None, Path("/t/pairs") if draws(section) else None
        )
        for read, section in sections
    ]
    assert len(made) > len(judged) > 3
    assert [draw_config(read, section, 4, DATA, None) for read, section in sections if draws(section)]


def test_what_was_found_stands_in_the_config_and_nothing_else_changes() -> None:
    from plumbline.config.file import dump_config

    read = config({"type": "ple", "learner": {"batch_size": 8}}, {"type": "dlma"})
    arm = arms_of(tuned(read, 1), {"lr": [1e-3, 1e-2], "beta": [0.5]})[0]
    found = with_values(read, {"dlma": arm})
    assert found.pipelines[0] == read.pipelines[0]
    text = dump_config(found, brief=True)
    assert parse_text(text, "x") == found
    assert "beta: 0.5" in text and "lr: 0.001" in text
    assert "gradient_checkpointing" not in text, "a default that nobody gave"
