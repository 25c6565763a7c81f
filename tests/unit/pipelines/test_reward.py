"""What a `reward` pipeline trains on: labelled texts and pairs become samples, the last twentieth is kept back."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.reward import reward_batches
from plumbline.data.dataset import LabelledText
from plumbline.miniature.tokenizer import make_tokenizer
from plumbline.records import Message, Prompt


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
