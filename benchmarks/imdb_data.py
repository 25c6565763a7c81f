"""The data of PLE's IMDb table (`benchmarks/imdb.py`): reviews into a reward model's texts and into prompts with what
followed them, and two scored answers a prompt into one pair."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random
from typing import Any

from plumbline.data.dataset import LabelledText
from plumbline.errors import DataError

ASKED = "Continue this movie review: "
FIRST = (3, 12)
"""Words of a review that a prompt has, at least and at most."""
LEAST = 4
"""Words of a target, at least."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Rows as the configs read them. No two of them have a review in common."""

    prompts_heldout: list[Row]
    prompts_tune: list[Row]
    prompts_train: list[Row]
    reviews_heldout: list[Row]
    reviews_train: list[Row]


def split_reviews(
    reviews: Iterable[LabelledText],
    *,
    seed: int,
    prompts: int,
    heldout: int,
    tune: int,
    reviews_heldout: int,
    words: int,
) -> Splits:
    """Every review once, in an order of the seed: to held-out prompts, to those that rates are found on, to prompts, to
    held-out reviews, and what is left to the reward model. One that makes no prompt (see `as_prompt`) is a text of the
    reward model.

    Args:
        prompts, heldout, tune, reviews_heldout: how many of each.
        words: most that a target has.

    Raises:
        DataError: there are too few reviews, or those of the reward model are all of one label.
    """
    labels = {
        clean(review.text): int(review.label) for review in reviews
    }  # what is there twice must not be on two sides
    drawn, texts = Random(seed), sorted(text for text in labels if text)
    drawn.shuffle(texts)
    asked: list[Row] = []
    rest: list[Row] = []
    wanted = heldout + tune + prompts
    for text in texts:
        prompt = as_prompt(text, first=drawn.randint(*FIRST), words=words) if len(asked) < wanted else None
        if prompt:
            asked.append({**prompt, "label": labels[text]})
        else:
            rest.append({"text": text, "label": labels[text]})
    drawn.shuffle(rest)  # those that make no prompt came first
    judged, learnt = rest[:reviews_heldout], rest[reviews_heldout:]
    if len(asked) < wanted or len({row["label"] for row in learnt}) < 2:
        raise DataError(
            f"{len(texts)} different reviews are too few for {wanted} prompts, {reviews_heldout} held-out "
            "reviews and a reward model that learns from some of either label; give the data set whole"
        )
    return Splits(
        prompts_heldout=asked[:heldout],
        prompts_tune=asked[heldout : heldout + tune],
        prompts_train=asked[heldout + tune :],
        reviews_heldout=judged,
        reviews_train=learnt,
    )


def clean(text: str) -> str:
    """A review without HTML's line breaks, its white space single."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def as_prompt(text: str, *, first: int, words: int) -> Row | None:
    """A review's `first` words as the prompt and as many whole sentences after them as `words` have room for as the
    target; None where there is no such sentence."""
    said = text.split()
    after = said[first : first + words]
    ends = [i for i, word in enumerate(after, start=1) if re.search(r"[.!?][\"')]*$", word)]
    if not ends or ends[-1] < LEAST:
        return None
    return {"prompt": ASKED + " ".join(said[:first]), "target": " ".join(after[: ends[-1]])}


def ordered_pairs(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of `PAIR_SCHEMA` in which two answers of π0 are a prompt's rejected ones, as one row a prompt: the answer
    with the higher reward is chosen, the other one rejected. None where the rewards are equal, or one has none.
    """
    found = []
    for _, own in groupby(rows, key=lambda row: (row["step"], row["prompt_id"])):
        both = [row for row in own if row["rejected_reward"] is not None]
        if len({row["rejected_reward"] for row in both}) != 2:
            continue
        better, worse = sorted(both, key=lambda row: row["rejected_reward"], reverse=True)
        found.append(
            {
                **worse,
                **{f"chosen_{name}": better[f"rejected_{name}"] for name in ("reward", "finish_reason", "ids")},
                "chosen": better["rejected"],
                "ref_chosen_logps": better["ref_rejected_logps"],
                "similarity": None,
            }
        )
    return found
