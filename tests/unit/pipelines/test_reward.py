"""What a `reward` pipeline trains on: labelled texts and pairs become samples, the last twentieth is kept back; and how
its model is judged on what was held out."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.scorer import Scorer
from pipelines.reward import Labelled, heldout_accuracy, reward_batches
from plumbline.config.fleet import ScorerFleet
from plumbline.data.dataset import LabelledText
from plumbline.errors import RunError
from plumbline.miniature.tokenizer import make_tokenizer
from plumbline.records import Message, Prompt, ScoreRequest


@pytest.mark.parametrize("kind", ["labelled", "pairs"])
def test_each_row_is_a_sample_of_what_the_classifier_reads(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("pipelines.reward.AT_ONCE", 4)
    tokenizer: Any = make_tokenizer()
    turns = (Message(role="user", content="Why?"),)
    texts = [f"{'the ' * n}goat" for n in range(1, 12)]
    rows = (
        [LabelledText(text=text, label=float(i % 2)) for i, text in enumerate(texts)]
        if kind == "labelled"
        else [Prompt(id=text, messages=turns, chosen=text, rejected=("the", "goat")) for text in texts]
    )
    context: Any = SimpleNamespace(
        rows=SimpleNamespace(rewards={"r": (rows, [])}), tokenizer=tokenizer, config=SimpleNamespace(seed=0)
    )
    section: Any = SimpleNamespace(
        name="r", reads="response", max_len=8, epochs=1, learner=SimpleNamespace(batch_size=64)
    )
    batches, heldout, trained_on = reward_batches(context, section)
    [batch] = batches
    assert trained_on == len(batch) == (10 if kind == "labelled" else 21) and len(heldout) == 1
    ids = [tokenizer.encode(text)[:8] for text in texts]
    if kind == "labelled":
        expected = [([own], (float(i % 2),)) for i, own in enumerate(ids[:10])]
    else:
        both = [tokenizer.encode(text) for text in ("the", "goat")]
        expected = [([own, other], (1.0,)) for own in ids for other in both][:21]
    found = [(sample.group.response_ids, sample.rewards) for sample in batch]
    assert sorted(found) == sorted(expected) and all(not sample.group.prompt_ids for sample in batch)


class Judge(Scorer):
    """A scorer whose model counts letters, and fails on what has none."""

    def __init__(self) -> None:
        self._service = None
        self._reward = lambda requests: [
            float(len(one.response)) / any(map(str.isalpha, one.response)) for one in requests
        ]


def judged(rows: list[Labelled], source: str) -> float:
    """`heldout_accuracy` of rows by that scorer."""

    async def score(requests: list[ScoreRequest]) -> Any:
        return Judge().score(requests)

    scorer = SimpleNamespace(score=SimpleNamespace(remote=lambda requests: asyncio.ensure_future(score(requests))))
    fleet = SimpleNamespace(add_scorers=lambda settings, spec: [scorer], others=[])
    config = SimpleNamespace(fleet=SimpleNamespace(scorer=ScorerFleet()))
    context: Any = SimpleNamespace(fleet=fleet, config=config, device="cpu")
    section: Any = SimpleNamespace(source=source, reads="response", max_len=8)
    return asyncio.run(heldout_accuracy(context, section, Path("model"), rows))


def pair(chosen: str, rejected: str) -> Labelled:
    return [ScoreRequest(messages=(), response=text) for text in (chosen, rejected)], 1.0


def test_accuracy_is_the_share_of_pairs_in_order_or_of_texts_on_their_side() -> None:
    assert (
        judged([pair("longer", "less"), pair("less", "longer"), pair("longest", "less"), pair("a", "b")], "pairs")
        == 0.5
    )
    texts = [([ScoreRequest(messages=(), response="text")], label) for label in (1.0, 1.0, 0.0)]
    assert judged(texts, "labelled") == pytest.approx(2 / 3), "all of them are above 0"


def test_a_model_that_fails_on_the_held_out_rows_ends_the_pipeline() -> None:
    with pytest.raises(RunError, match=r"cannot judge the held-out rows: .*zero"):
        judged([pair("longer", "...")], "pairs")
