"""Which side is slow, by hand."""

from typing import Any

import pytest

from plumbline.report.balance import balance


def step(learner: float | None, generator: float | None, seconds: float = 1.0, tokens: float = 9.0) -> dict[str, Any]:
    return {
        "pipeline": "ple",
        "learner_idle": learner,
        "generator_idle": generator,
        "seconds": seconds,
        "tokens_per_s": tokens,
    }


@pytest.mark.parametrize(
    ("learner", "generator", "side", "key"),
    [
        (0.71, 0.05, "Generators are the slow side: learners waited 71% of the time", "`fleet.generator.replicas`"),
        (0.02, 0.64, "Learners are the slow side: learners waited 2%", "`learner.micro_tokens`"),
        (0.5, 0.4, "Both sides wait for each other", "`max_staleness`"),
        (0.24, 0.1, "Balanced: learners waited 24% of the time for rollouts, generators stood idle 10% of it.", ""),
    ],
)
def test_the_sentence_names_the_side_and_a_key(learner: float, generator: float, side: str, key: str) -> None:
    said = balance([step(learner, generator)])
    assert said.startswith(side) and key in said and said.endswith(".")


def test_shares_are_weighted_by_seconds() -> None:
    # (0.9 · 30 + 0.1 · 10) / 40 = 0.7
    assert "waited 70% of" in balance([step(0.9, 0.0, seconds=30.0), step(0.1, 0.0, seconds=10.0)])


def test_steps_that_drew_nothing_do_not_count() -> None:
    assert balance([]) == balance([{"pipeline": "pool", "utilisation": 0.5}]) == ""
    assert balance([step(0.0, 1.0, tokens=0.0), step(None, 0.5)]) == ""
    assert balance([step(0.0, 1.0, tokens=0.0), step(0.9, 0.0)]).startswith("Generators")
