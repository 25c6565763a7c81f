"""Samples as arrays until their batch is asked for: the same ones, each once an epoch, in an order of the seed."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.batches import Batches
from pipelines.offline import OfflinePairs
from plumbline.config.data import Source
from plumbline.errors import ConfigError, DataError
from plumbline.records import Message, Prompt, Sample, TokenGroup
from plumbline.runs.pairs import PAIR_SCHEMA, Answer, pair_rows
from plumbline.runs.parts import Parts


def segments(response: list[int]) -> dict[str, list[int]]:
    """What a tokenizer returns beside the ids: here, which of two texts a token is of."""
    return {"token_type_ids": [k % 2 for k in range(len(response))]}


SAMPLES = [
    Sample(
        group=TokenGroup(
            [i, i + 1] if i % 2 else [], responses := [[i], [], [i] * 3], [segments(r) for r in responses]
        ),
        rewards=(float(i),),
    )
    for i in range(7)
]


def test_every_sample_comes_once_an_epoch_as_it_was() -> None:
    batches = Batches(iter(SAMPLES), size=3, epochs=2, seed=5)
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1]
    for epoch in range(2):
        order = list(SAMPLES)
        random.Random(f"5-{epoch}").shuffle(order)
        assert [one for batch in batches[3 * epoch : 3 * epoch + 3] for one in batch] == order
    assert batches[-1] == batches[5] and batches[0] == Batches(SAMPLES, 3, 2, 5)[0]
    with pytest.raises(IndexError):
        batches[6]


def test_nothing_makes_no_batch() -> None:
    assert list(Batches([], size=3, epochs=2, seed=0)) == []


def parts(directory: Path, negatives: int = 4) -> Source:
    """Parts of two steps with two prompts each."""
    written = Parts(str(directory), PAIR_SCHEMA)
    for step in (1, 2):
        rows: list[dict[str, object]] = []
        for name in ("a", "b"):
            answers = [Answer(text=f"{k}", ids=[step, k]) for k in range(negatives + 1)]
            prompt = Prompt(id=name, messages=(Message(role="user", content="Why?"),))
            logps = [-1.0 - k for k in range(negatives + 1)]
            rows += pair_rows(
                step=step, prompt=prompt, prompt_ids=[7], answers=answers, ref_logps=logps, rewards=None, engine=None,
                model="m",
            )  # fmt: skip
        written.write(step, rows)
    return Source(path=str(directory))


@pytest.mark.parametrize(("negatives", "kept"), [(1, 1), (3, 3), (8, 4), (None, 4)])
def test_given_parts_have_as_many_negatives_as_are_asked_for(tmp_path: Path, negatives: int | None, kept: int) -> None:
    context: Any = SimpleNamespace(fingerprint="m")
    offline = OfflinePairs(context, parts(tmp_path), negatives)
    assert [prompt.id for prompt in offline.fit.prompts] == ["1/a", "1/b", "2/a", "2/b"]
    rows = offline.rollout(9, offline.fit.prompts[1:3]).rows
    assert [(row["step"], row["prompt_id"]) for row in rows] == [(9, "b")] * kept + [(9, "a")] * kept
    assert [row["rejected"] for row in rows] == [str(k) for k in range(1, kept + 1)] * 2
    assert rows[0]["chosen_ids"] == [1, 0] and rows[-1]["chosen_ids"] == [2, 0]


def test_parts_are_taken_whole_and_are_this_models(tmp_path: Path) -> None:
    source, context = parts(tmp_path), SimpleNamespace(fingerprint="other")
    with pytest.raises(DataError, match="parts of another model"):
        OfflinePairs(context, source)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="these are parts, which are taken whole"):
        OfflinePairs(context, source.model_copy(update={"limit": 3}))  # type: ignore[arg-type]
