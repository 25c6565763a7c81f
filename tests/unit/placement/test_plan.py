"""Plans for given machines and models: whole tables against files beside this one, and what must hold of any plan."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from actors.engines.seam import engine_spec
from plumbline.config.demand import demand, reference_replicas
from plumbline.config.file import parse_config
from plumbline.config.section import bounds, planned
from plumbline.config.tree import Config
from plumbline.placement.machine import Machine
from plumbline.placement.packing import pack
from plumbline.placement.plan import Plan, make_plan
from plumbline.placement.remedies import remedy
from plumbline.placement.roles import roles_of
from plumbline.placement.sizes import Shape, Sizes
from plumbline.placement.table import text

TABLES = Path(__file__).with_name("plans.txt")

SMALL = Shape(
    parameters=134_515_008,
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49_152,
)
SEVEN = Shape(
    parameters=6_738_415_616,
    layers=32,
    hidden=4096,
    intermediate=11_008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab=32_000,
)
SEVENTY = Shape(
    parameters=70_553_706_496,
    layers=80,
    hidden=8192,
    intermediate=28_672,
    heads=64,
    kv_heads=8,
    head_dim=128,
    vocab=128_256,
)
MODELS = {"135M": SMALL, "7B": SEVEN, "70B": SEVENTY}
REWARD = Shape(
    parameters=184_423_682,
    stored=368_847_364,
    layers=12,
    hidden=768,
    intermediate=3072,
    heads=12,
    kv_heads=12,
    head_dim=64,
    vocab=128_100,
)
EMBEDDER = Shape(parameters=33_360_000, stored=133_440_000)

METHODS: list[dict[str, Any]] = [{"type": "ple"}, {"type": "dlma"}, {"type": "self_contrast"}]


def config_of(pipelines: list[dict[str, Any]] = METHODS, **sections: Any) -> Config:
    tree = {
        "name": "placed",
        "model": {"path": "base", "max_len": 1024},
        "data": {"train": {"path": "prompts.jsonl"}},
        "reward": {"type": "classifier", "path": "reward", "max_len": 512},
        "embedder": {"path": "embedder"} if any(p["type"] == "self_contrast" for p in pipelines) else None,
        "pipelines": pipelines,
        **sections,
    }
    return parse_config(tree, origin="test")


def machine_of(gpus: int, gib: float = 80, **changes: Any) -> Machine:
    return Machine(**{"gpus": gpus, "gib": gib, "cpus": 16, "ram_gib": 1000, "per_node": gpus, **changes})


def sizes_of(model: Shape) -> Sizes:
    return Sizes(model=model, rewards={"reward": REWARD}, embedder=EMBEDDER)


def plan_of(config: Config, machine: Machine, model: Shape, **changes: Any) -> Plan:
    device: Literal["cpu", "cuda"] = "cuda" if machine.gpus or machine.cluster else "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32" if device == "cpu" else "bfloat16"
    return make_plan(config, machine, sizes_of(model), device, dtype, **changes)


def table(config: Config, machine: Machine, model: Shape) -> str:
    """A plan as `plumbline doctor` shows it, what it lacks, and the numbers that a run is started by."""
    plan = plan_of(config, machine, model)
    lines = [text(plan.rows), *(f"FAIL {one}" for one in (*plan.problems, *plan.over))]
    if plan.problems:
        lines.append("     " + remedy(config, machine, lambda config, machine: plan_of(config, machine, model)))
    else:
        lines += numbers(plan.config)
    return "\n".join(lines) + "\n"


def numbers(config: Config) -> list[str]:
    fleet, embedder = config.fleet, config.embedder
    one = fleet.generator
    return [
        f"generator: replicas {one.replicas}, gpus {one.gpus}, memory_share {one.memory_share}, cpus {one.cpus}",
        f"gpus: scorer {fleet.scorer.gpus}, reference {fleet.reference.gpus}, "
        f"embedder {embedder.gpus if embedder else 'none'}, "
        f"learners {', '.join(str(p.learner.gpus) for p in config.pipelines)}"
        + (f", sft {config.sft.learner.gpus}" if config.sft else ""),
    ]


CHECKPOINTING = {"learner": {"gradient_checkpointing": True}}
THREE = [{**method, **CHECKPOINTING} for method in METHODS]
FULL = [{"type": "ple", "policy": {"type": "full"}, **CHECKPOINTING}]
ZERO = {**CHECKPOINTING["learner"], "strategy": "deepspeed", "zero": 3, "workers": 4}


def cases() -> Iterator[tuple[str, str]]:
    for (name, model), gpus in itertools.product(MODELS.items(), (0, 1, 2, 8)):
        yield (
            f"{name}, three methods with LoRA, {gpus} GPUs of 80 GiB",
            table(config_of(THREE), machine_of(gpus), model),
        )
    for title, config, machine, model in [
        ("7B, the same without gradient checkpointing, 2 GPUs of 80 GiB", config_of(), machine_of(2), SEVEN),
        ("7B, three methods with LoRA, 2 GPUs of 24 GiB", config_of(THREE), machine_of(2, 24), SEVEN),
        ("7B, PLE with LoRA, 1 GPU of 24 GiB", config_of(THREE[:1]), machine_of(1, 24), SEVEN),
        ("7B, PLE with LoRA, 2 GPUs of 24 GiB", config_of(THREE[:1]), machine_of(2, 24), SEVEN),
        ("7B, PLE with all weights, 8 GPUs of 80 GiB", config_of(FULL), machine_of(8), SEVEN),
        (
            "7B, PLE with all weights by ZeRO 3, 8 GPUs of 80 GiB",
            config_of([{**FULL[0], "learner": ZERO}]),
            machine_of(8),
            SEVEN,
        ),
        (
            "70B, PLE with LoRA by ZeRO 3, 8 GPUs of 80 GiB",
            config_of([{"type": "ple", "learner": ZERO}]),
            machine_of(8),
            SEVENTY,
        ),
        (
            "135M, an sft stage of all weights before, 1 GPU of 80 GiB",
            config_of(THREE, sft=CHECKPOINTING),
            machine_of(1),
            SMALL,
        ),
    ]:
        yield title, table(config, machine, model)


def all_tables() -> str:
    return "\n".join(f"## {title}\n\n{found}" for title, found in cases())


def test_plans_are_those_that_were_looked_at() -> None:
    """`PYTHONPATH=. python -m tests.unit.placement.test_plan` writes them anew; read the difference."""
    assert all_tables() == TABLES.read_text("utf-8")


# What must hold of any plan


def random_config(draw: random.Random) -> Config:
    """Some keys given, the others `auto`."""

    def some(**keys: Any) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if draw.random() < 0.2}

    pipelines = [
        {
            "type": kind,
            "learner": {
                "workers": draw.choice([1, 1, 1, 2]),
                "gradient_checkpointing": draw.random() < 0.7,
                **some(gpus=draw.choice([0.1, 0.5, 1]), cpus=2),
            },
        }
        for kind in draw.sample(["ple", "dlma", "self_contrast"], draw.randint(1, 3))
    ]
    fleet = {
        "generator": some(gpus=draw.choice([0.3, 1, 2]), replicas=draw.choice([1, 2]), memory_share=0.4, cpus=3),
        "scorer": some(gpus=draw.choice([0, 0.25]), replicas=2),
    }
    if any(one["type"] != "ple" for one in pipelines):  # who asks it
        fleet["reference"] = some(gpus=draw.choice([0, 0.5]), replicas=2)
    return config_of(pipelines, fleet=fleet)


def given_keys(node: Any, key: str = "") -> dict[str, Any]:
    """What a config says, without what it leaves open."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for name, value in items for k, v in given_keys(value, f"{key}.{name}").items()}
    return {} if node == "auto" else {key: node}


def autos(node: Any) -> int:
    if isinstance(node, dict | list):
        return sum(autos(one) for one in (node.values() if isinstance(node, dict) else node))
    return node == "auto"


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 4, 8])
def test_any_plan_keeps_what_is_given_and_fits_its_cards(gpus: int) -> None:
    draw, planned_ones, free = random.Random(gpus), 0, 0
    for _ in range(150):
        config, model = random_config(draw), draw.choice([SMALL, SEVEN])
        machine = machine_of(gpus, draw.choice([24, 80]))
        plan = plan_of(config, machine, model)
        kept, placed = given_keys(config.model_dump(mode="json")), plan.config.model_dump(mode="json")
        assert kept.items() <= given_keys(placed).items()
        assert autos(placed) == autos({k: v for k, v in kept.items() if v == "auto"}) + autos_that_stay(placed)
        if plan.problems or not gpus:
            continue
        planned_ones += 1
        asked = demand(plan.config)["GPU"]
        assert asked <= gpus + 1e-9
        cards = pack(shares(plan.config), gpus)
        assert cards is not None, "Ray finds no room for it in the order of a run"
        if not any(key.endswith((".gpus", ".memory_share")) for key in kept):
            assert_no_card_is_over(plan, cards, machine)
            assert not plan.over
            free += 1
    assert not gpus or (planned_ones > 20 and free > 3)


def autos_that_stay(placed: dict[str, Any]) -> int:
    """Of keys whose `auto` is no number of a plan: fleet.engine, fleet.device, model.dtype."""
    return [placed["fleet"]["engine"], placed["fleet"]["device"], placed["model"]["dtype"]].count("auto")


def shares(config: Config) -> list[float]:
    """Of every process, in the order in which a run starts them."""
    fleet = config.fleet
    found = [planned(fleet.generator.gpus)] * bounds(planned(fleet.generator.replicas))[0]
    found += [planned(fleet.scorer.gpus)] * fleet.scorer.replicas
    if copies := reference_replicas(config):
        found += [planned(fleet.reference.gpus)] * copies
    if config.embedder and any(p.embeds for p in config.methods):
        found += [planned(config.embedder.gpus)] * config.embedder.replicas
    for one in config.pipelines:
        found += [planned(one.learner.gpus)] * bounds(one.learner.workers)[0]
    return found


def assert_no_card_is_over(plan: Plan, cards: list[tuple[int, ...]], machine: Machine) -> None:
    """Neither by memory nor by shares."""
    gib = [row.gib for row in plan.rows for _ in range(row.count)]
    asked = shares(plan.config)
    for card in range(machine.gpus):
        there = [i for i, taken in enumerate(cards) if card in taken]
        assert sum(gib[i] for i in there) <= machine.gib * 0.9 + 1e-6
        assert sum(min(1.0, asked[i]) for i in there) <= 1 + 1e-9


def test_without_a_gpu_nothing_changes() -> None:
    plan = plan_of(config_of(), machine_of(0, cpus=2), SMALL)
    generator = plan.config.fleet.generator
    assert (generator.replicas, generator.cpus, generator.gpus) == (1, 1, 0)
    assert [(p.learner.cpus, p.learner.gpus) for p in plan.config.pipelines] == [(1, 0)] * 3
    assert plan.config.fleet.reference.cpus == 1
    assert {row.where for row in plan.rows} == {"CPU"}


@pytest.mark.parametrize(("cpus", "threads"), [(2, 1), (4, 1), (8, 2), (64, 8)])
def test_processors_are_shared_by_engines_and_learners(cpus: int, threads: int) -> None:
    plan = plan_of(config_of(), machine_of(0, cpus=cpus), SMALL)
    assert plan.config.fleet.generator.cpus == plan.config.pipelines[0].learner.cpus == threads


def test_what_only_makes_parts_leaves_its_processors_and_no_room_for_adapters_to_the_engine() -> None:
    made = plan_of(config_of([{"type": "raft", "train": False}]), machine_of(0, cpus=2), SMALL).config
    assert made.fleet.generator.cpus == 2 and engine_spec(made, "base", "float32", "cpu", versions=2).max_adapters == 0
    taught = plan_of(config_of([{"type": "raft"}]), machine_of(0, cpus=2), SMALL).config
    assert taught.fleet.generator.cpus == 1
    assert engine_spec(taught, "base", "float32", "cpu", versions=2).max_adapters == 2


@pytest.mark.parametrize("cards", [0, 1])
def test_what_only_makes_parts_has_no_learner_that_is_given_room(cards: int) -> None:
    made = plan_of(config_of([{"type": "raft", "train": False}]), machine_of(cards, cpus=2), SMALL)
    assert not [row for row in made.rows if "learner" in row.role]
    asked = demand(made.config)
    assert asked["CPU"] == planned(made.config.fleet.generator.cpus)
    assert asked["GPU"] == planned(made.config.fleet.generator.gpus) + planned(made.config.fleet.scorer.gpus)


def test_a_cluster_without_a_gpu_yet_is_asked_for_whole_ones() -> None:
    config = config_of(fleet={"generator": {"gpus": 1}})
    plan = plan_of(config, machine_of(0, 0, cluster=True), SEVEN)
    assert not plan.problems and {row.where for row in plan.rows} == {"GPUs to come"}
    assert [p.learner.gpus for p in plan.config.pipelines] == [1, 1, 1]
    assert plan.config.fleet.scorer.gpus == plan.config.fleet.reference.gpus == 0.33


def test_given_keys_that_do_not_fit_together_are_told() -> None:
    """Ray has room for three tenths; the cards have none for what is in them."""
    pipelines = [{**method, "learner": {"gpus": 0.2}} for method in METHODS]
    fleet = {"generator": {"gpus": 0.3, "memory_share": 0.3}, "scorer": {"gpus": 0}, "reference": {"gpus": 0}}
    plan = plan_of(config_of(pipelines, fleet=fleet), machine_of(1), SEVEN)
    assert not plan.problems
    [told] = plan.over
    assert told.startswith("GPU 0: about 204.") and "learner of dlma 59.9" in told and told.endswith("it has 80.0")


def test_an_evaluation_has_the_cards_to_itself() -> None:
    plan = plan_of(config_of(THREE), machine_of(8), SEVEN, part="evaluation")
    assert [row.role for row in plan.rows] == ["generator", "scorer"]
    assert plan.config.fleet.generator.replicas == 7
    assert [p.learner.gpus for p in plan.config.pipelines] == [0, 0, 0]


def test_an_engine_that_splits_no_model_says_so() -> None:
    plan = plan_of(config_of([{"type": "ple", "learner": ZERO}]), machine_of(8), SEVENTY, splits=False)
    [told] = plan.problems
    assert told.startswith("8 GPUs have no room for all at once (GiB: generator ")


def test_two_workers_of_one_learner_are_never_on_one_card() -> None:
    one = [{"type": "ple", "learner": {"workers": 2}}]
    assert plan_of(config_of(one), machine_of(1), SMALL).problems
    assert plan_of(config_of(one), machine_of(3), SMALL).config.pipelines[0].learner.gpus == 1


if __name__ == "__main__":
    TABLES.write_text(all_tables(), encoding="utf-8")


def test_the_parts_of_a_sum_are_placed_as_rewards_are_alone() -> None:
    classifier = {"type": "classifier", "path": "reward", "max_len": 512}
    large = classifier | {"batch_tokens": 32_768}
    config = config_of(
        [{"type": "ple"}, {"type": "dlma"}],
        reward={"type": "sum", "of": [{"reward": classifier, "name": "a"}, {"reward": large, "name": "b"}]},
        fleet={"scorer": {"replicas": 2}, "reference": {"replicas": 1}},
    )
    sizes = Sizes(model=SMALL, rewards={f"reward.of.{i}.reward": REWARD for i in range(2)})
    [scorer] = [one for one in roles_of(config, sizes, 2, "run", cuda=True) if one.key == ("fleet", "scorer")]
    assert (scorer.name, scorer.count) == ("scorer", 4)
    assert scorer.need is not None and "activations of 32768 tokens" in scorer.need.why, "the largest of them"
