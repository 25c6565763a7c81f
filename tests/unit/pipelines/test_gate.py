"""The gate: which versions it lets through, and what it says of those it does not."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.evaluate import Answers
from pipelines.gate import Gatekeeper, figures_of, refusal
from plumbline.config.serving import Gate
from plumbline.errors import RunError
from plumbline.records import Message, PolicyRef, Prompt
from plumbline.runs.evaluated import read_answers
from plumbline.runs.promotions import Catalog, promoted

BASE = {"reward": 0.0, "gap": 0.7, "ppl": 10.0, "length": 20.0}


def ref(version: int) -> PolicyRef:
    return PolicyRef(policy="ple", version=version)


@pytest.mark.parametrize(
    ("new", "present", "said"),
    [
        (BASE, BASE, None),
        ({**BASE, "reward": 0.5}, {**BASE, "reward": 0.4}, None),
        ({**BASE, "reward": 0.35}, {**BASE, "reward": 0.4}, "its reward is 0.35, below 0.4"),
        ({**BASE, "ppl": 12.6}, BASE, "its ppl is 12.6, above 12.5"),
        ({**BASE, "length": 9.0}, BASE, "its length is 9, below 10"),
        ({**BASE, "length": 41.0}, BASE, "its length is 41, above 40"),
        ({**BASE, "gap": 0.9}, BASE, "its gap is 0.9, above 0.8"),
        ({**BASE, "reward": float("nan")}, BASE, "not finite"),
        ({"ppl": 10.0, "length": 20.0}, BASE, "it has no reward"),
        ({"length": 20.0}, {"length": 20.0}, "it has no ppl"),
    ],
)
def test_the_gate_refuses_what_is_worse_than_its_bounds(
    new: dict[str, float], present: dict[str, float], said: str | None
) -> None:
    reason = refusal(Gate(max_gap_rise=0.1), new, present, BASE)
    assert reason is None if said is None else said in str(reason)


def test_what_a_run_cannot_measure_is_not_looked_at() -> None:
    assert refusal(Gate(), {"length": 20.0}, {"length": 20.0}, {"length": 20.0}) is None


def test_figures_are_means_over_answers_that_have_them() -> None:
    answers = Answers(
        plain=["a", "b", ""],
        guided=["c", "d", "e"],
        rewards=[1.0, 3.0, float("nan")],
        guided_rewards=[2.0, 5.0, 1.0],
        judged=[],
        judged_guided=[],
        lengths=[2, 4, 0],
        finished=1.0,
        ppl=7.0,
    )
    assert figures_of(answers) == {"length": 2.0, "ppl": 7.0, "reward": 2.0, "gap": 1.5}


PROMPT = Prompt(id="0", messages=(Message(role="user", content="Why?"),))


class Events:
    """What a run would log and show."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []
        self.said: list[str] = []

    def write(self, event: dict[str, Any]) -> None:
        self.written.append(event)

    def say(self, message: str) -> None:
        self.said.append(message)


def look(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, rewards: dict[int, float | Exception], offers: list[int]
) -> tuple[Events, list[int]]:
    """Offer versions of these rewards at once to a gate that looks at every one; returns what it asked, in order."""
    events, asked = Events(), []
    config = SimpleNamespace(
        serve=SimpleNamespace(gate=Gate(every=1)),
        evaluation=SimpleNamespace(generation=None),
        methods=[SimpleNamespace(generation=None)],
    )

    async def answers_of(context: Any, ref: PolicyRef, *given: Any) -> Answers:
        asked.append(ref.version)
        reward = rewards[ref.version]
        if isinstance(reward, Exception):
            raise reward
        await asyncio.sleep(0)
        return Answers(
            plain=["a"],
            guided=[],
            rewards=[reward],
            guided_rewards=[],
            judged=[],
            judged_guided=[],
            lengths=[4],
            finished=1.0,
            ppl=None,
        )

    monkeypatch.setattr("pipelines.gate.answers_of", answers_of)
    monkeypatch.setattr("pipelines.gate.heldout_prompts", lambda context: [PROMPT])
    monkeypatch.setattr("pipelines.gate.evaluation_principle", lambda config: None)

    async def main() -> None:
        context: Any = SimpleNamespace(config=config, run_dir=run_dir, events=events)
        promoter = Gatekeeper(context)
        for version in offers:
            promoter.offer(ref(version), last=False)
        await promoter.finish()

    asyncio.run(main())
    return events, asked


def test_a_learner_that_only_gets_worse_is_never_promoted(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    for version in (1, 2, 3, 4):
        events, _ = look(monkeypatch, run_dir, {0: 0.0, **{v: -0.1 * v for v in range(1, 5)}}, [version])
        assert events.written[0]["refused"].startswith("its reward is -0."), events.written
        assert events.said == [f"not promoted ple@{version}: {events.written[0]['refused']}"]
    assert promoted(run_dir, "ple") == [] and Catalog(run_dir, ["ple"]).resolve("ple") == ref(0)


def test_of_the_versions_that_wait_the_newest_is_looked_at(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    events, asked = look(monkeypatch, run_dir, {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}, [1, 2, 3, 4])
    assert promoted(run_dir, "ple") == [4] and set(asked) == {0, 4}
    assert events.said == ["promoted ple@4: length 4, reward 0.4"]
    kept = {
        who: [(row["prompt"], row["answer"], row["reward"]) for row in rows]
        for who, rows in read_answers(run_dir).items()
    }
    assert kept == {"base": [("Why?", "a", 0.0)], "ple@4": [("Why?", "a", 0.4)]}


def test_a_look_that_fails_promotes_nothing_and_harms_nobody(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    events, _ = look(monkeypatch, run_dir, {0: 0.0, 1: RunError("the engine was lost")}, [1])
    assert promoted(run_dir, "ple") == []
    assert events.said == ["not promoted ple@1: it could not be looked at (the engine was lost)"]


def test_what_it_has_yet_to_decide_on_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(serve=SimpleNamespace(gate=Gate(every=1)))
    gate = Gatekeeper(SimpleNamespace(run_dir=tmp_path, config=config))  # type: ignore[arg-type]
    seen: list[set[int]] = []

    async def looks(settings: Gate, one: PolicyRef) -> None:
        seen.append(gate.looks_at("ple"))

    async def offers() -> None:
        for version in (1, 2, 3):
            gate.offer(ref(version), last=False)
        seen.append(gate.looks_at("ple"))
        await gate.finish()

    monkeypatch.setattr(gate, "_look", looks)
    asyncio.run(offers())
    assert seen == [{1, 2, 3}, {3}], "the newest alone is looked at"
    assert gate.looks_at("ple") == gate.looks_at("other") == set()
