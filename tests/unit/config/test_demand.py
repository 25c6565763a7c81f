"""Resources by name in a config: what is refused, what a run asks of its cluster, and where it then computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plumbline.config.demand import beside_sft, demand, named, reference_replicas
from plumbline.config.file import load_config
from plumbline.config.tree import Config
from plumbline.doctor import examine
from plumbline.errors import ConfigError
from plumbline.placement.machine import Machine
from plumbline.placement.plan import without_gpus
from plumbline.placement.start import place, run_device
from tests.tiny import tiny_config, write_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def path(tiny: dict[str, Any], tmp_path: Path) -> Path:
    return write_config(tmp_path, tiny)


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ("{GPU: 1}", "'GPU' is no resource by name"),
        ("{memory: 1}", "'memory' is no resource by name"),
        ("{a b: 1}", "'a b' is no resource by name"),
        ("{generator: 0}", "greater than or equal to 0.0001, got 0"),
        ("{generator: much}", "valid number"),
        ("generator", "should be a mapping of keys"),
    ],
)
def test_what_is_no_resource(path: Path, resources: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(path, [f"fleet.generator.resources={resources}"])
    assert "fleet.generator.resources" in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_all_roles_are_asked_for(path: Path) -> None:
    asked = load_config(
        path,
        [
            "pipelines=[{type: ple}, {type: dlma}]",
            "fleet.generator.resources={generator: 1}",
            "fleet.scorer.resources={scorer: 0.5}",
            "fleet.reference.resources={big: 1}",
            "pipelines.0.learner.resources={learner: 1, big: 1}",
        ],
    )
    assert named(without_gpus(asked)) == ["big", "generator", "learner", "scorer"]
    assert named(without_gpus(load_config(path))) == []


def test_each_part_of_a_sum_has_scorers_of_its_own(path: Path) -> None:
    part = "{reward: {type: program, function: a:b}, name: "
    several = f"reward={{type: sum, of: [{part}a}}, {part}b}}, {part}c}}]}}"
    asked = load_config(path, [several, "fleet.scorer={replicas: 2, resources: {scorer: 0.5}}"])
    assert demand(without_gpus(asked))["scorer"] == 3 * 2 * 0.5


def test_demand_is_of_all_that_runs_at_once() -> None:
    asked = load_config(
        ROOT / "configs/comments.yaml",
        [
            "fleet.generator={replicas: [0, 4], cpus: 3, gpus: 1, resources: {generator: 1}}",
            "fleet.scorer={gpus: 0.25, resources: {learner: 0.25}}",
            "fleet.reference.resources={big: 1}",
            "embedder.resources={small: 0.5}",
            "pipelines.0.learner={workers: [1, 2], cpus: 2, gpus: 1, resources: {learner: 1}}",
            "serve={enabled: true, placement: replicas, replicas: [1, 2], resources: {users: 1}}",
        ],
    )
    names = {"big": 1, "small": 0.5, "generator": 1, "users": 1, "learner": 1.5}  # with the judge, two rewards
    asked = without_gpus(asked)
    assert demand(asked) == {"CPU": 3 + 3 + 2 + 1 + 1, "GPU": 1 + 1 + 0.5 + 1, **names}
    names |= {"generator": 4, "users": 2, "learner": 2.5}
    assert demand(asked, most=True) == {"CPU": 4 * 3 + 2 * 3 + 2 * 2 + 1 + 1, "GPU": 4 + 2 + 0.5 + 2, **names}


DLMA = "pipelines=[{type: dlma, learner: {gpus: 1}}]"


@pytest.mark.parametrize(
    ("sets", "copies"),
    [
        ([DLMA], 0),
        (["pipelines=[{type: dlma}]"], 0),  # it is given a GPU
        (["pipelines=[{type: dlma, learner: {gpus: 0}}]"], 1),
        (["pipelines=[{type: dlma}, {type: self_contrast, filter: false, negatives: 1, learner: {gpus: 0}}]"], 1),
        (["pipelines=[{type: dlma, train: false}]"], 1),
        (["pipelines=[{type: dlma, policy: {type: full}, learner: {gpus: 1}}]"], 1),
        (["pipelines=[{type: dlma, learner: {gpus: 1, strategy: deepspeed, zero: 3}}]"], 1),
        (["pipelines=[{type: dlma, learner: {gpus: 1, strategy: deepspeed}}]"], 0),
        ([DLMA, "fleet.reference.gpus=0.5"], 1),  # it was given a place
        ([DLMA, "fleet.reference.resources={big: 1}"], 1),
        ([DLMA, "fleet.reference.replicas=2"], 2),
        (["pipelines=[{type: dlma}]", "fleet.reference.replicas=learner"], 0),
        ([], 0),  # ple asks nothing of π0
    ],
)
def test_a_copy_of_the_base_is_loaded_where_no_learner_on_this_machines_gpus_holds_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str], copies: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    box = Machine(gpus=8, gib=80, cpus=16, ram_gib=256, per_node=8)
    config = load_config(path, sets)
    placed = place(config, box)
    assert not placed.plan.problems
    assert reference_replicas(placed.plan.config) == copies
    assert any(row.role.startswith("reference") for row in placed.plan.rows) == bool(copies)
    if config.fleet.reference.replicas == "auto" and sets:
        on_cpus = place(load_config(path, [*sets, "fleet.device=cpu"]), replace(box, gpus=0))
        assert reference_replicas(on_cpus.plan.config) == 1
        assert reference_replicas(place(config, replace(box, cluster=True)).plan.config) == 1, "a cluster has a copy"


@pytest.mark.parametrize("section", ["train: false", "policy: {type: full}", "learner: {strategy: deepspeed, zero: 3}"])
def test_a_learner_without_the_base_cannot_be_asked_for_it(path: Path, section: str) -> None:
    sets = [f"pipelines=[{{type: dlma, {section}}}]", "fleet.reference.replicas=learner"]
    with pytest.raises(ConfigError, match="asks the learner of 'dlma', which does not hold π0") as caught:
        load_config(path, sets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["0", "1.5", "true", "learners", "[1, 2]"])
def test_what_is_no_number_of_references(path: Path, given: str) -> None:
    with pytest.raises(
        ConfigError, match=r"fleet\.reference\.replicas: should be auto, learner, or a count of 1 or more"
    ):
        load_config(path, [f"fleet.reference.replicas={given}"])


def test_sft_has_the_machine_to_itself_before_the_fleet_starts(path: Path) -> None:
    def placed(overrides: list[str]) -> Config:
        return without_gpus(load_config(path, overrides))

    shared = ["fleet.generator.gpus=0.5", "pipelines.0.learner.gpus=0.5"]
    assert demand(placed([*shared, "sft={learner: {gpus: 1}}"]))["GPU"] == 1
    assert demand(placed([*shared, "sft={learner: {gpus: 1, workers: 4}}"]))["GPU"] == 4


def test_doctor_says_who_must_offer_them(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(path, ["fleet.generator.resources={generator: 1}"])

    def devices() -> str:
        return next(f.note for f in examine(config, tmp_path / "run", lambda *_: "") if f.what == "devices")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert devices().endswith("a Ray started here offers generator")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert devices().endswith("nodes of the cluster must offer generator")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], "on which the learner of {name} may be placed, do not see it; name a place that all nodes see with "),
        (["pipelines.0.learner.resources={learner: 1}"], None),
        (["pipelines.0.learner.resources={generator: 1}"], "on which the learner of {name} may be placed"),
        (["storage_path=store"], None),
        (["storage_path=store", "sft={}"], "on which a generator may be placed, do not see it"),
        (["storage_path=store", "sft={}", "fleet.generator.resources={learner: 1}"], None),
        (["storage_path=store", "model.adapter=lora"], "on which the learner of {name} may be placed, do not see it"),
    ],
)
def test_a_run_directory_that_its_nodes_do_not_see(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], told: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.chdir(tmp_path)
    config = load_config(path, changes)
    blind = ({"CPU": 8.0, "memory": 1e9, "generator": 2.0},)
    machine = Machine(gpus=0, gib=0, cpus=16, ram_gib=8, per_node=0, cluster=True, blind=blind)

    def found(machine: Machine) -> str:
        findings = examine(config, tmp_path / "run", lambda *_: "", lambda: machine)
        return next(f.note for f in findings if f.what == "run directory")

    assert "not seen" not in found(replace(machine, blind=()))
    if told is None:
        assert found(machine).endswith("; not seen by 1 nodes, which need not")
    else:
        expected = f"{tmp_path}/run: 1 of the cluster's nodes, " + told.format(name=config.pipelines[0].name)
        assert found(machine).startswith(expected)


def test_a_driver_without_gpus_runs_a_cluster_that_has_some(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine(gpus=0, gib=0, cpus=2, ram_gib=8, per_node=0)
    empty, full = replace(here, cluster=True), replace(here, gpus=4, gib=80, per_node=2, cluster=True)
    auto, gpus = load_config(path), load_config(path, ["fleet.generator.gpus=1"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_device(gpus, here) == "cpu"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert run_device(gpus, empty) == "cuda", "an autoscaler brings them"
    assert run_device(auto, empty) == "cpu"
    assert run_device(auto, full) == "cuda"
    assert run_device(load_config(path, ["fleet.device=cpu", "fleet.generator.gpus=1"]), full) == "cpu"
    assert run_device(load_config(path, ["fleet.device=cuda"]), empty) == "cuda"


def test_beside_sft_stand_the_fleet_and_what_its_learner_may_grow_by(path: Path) -> None:
    changes = [
        "sft={learner: {workers: [1, 4], gpus: 1, cpus: 2}}",
        "fleet.generator={replicas: [2, 8], cpus: 3, gpus: 0.5}",
        "fleet.scorer.gpus=0.25",
        "pipelines.0.learner={gpus: 1, cpus: 5}",
    ]
    asked = beside_sft(without_gpus(load_config(path, changes)))
    assert asked == {"CPU": 2 * 3 + 3 * 2, "GPU": 2 * 0.5 + 0.25 + 3 * 1}, "the pipeline's learner starts later"
