"""The pure parts of `benchmarks/imdb.py`: no review on two sides, pairs ordered by the reward, claims by numbers."""

from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest

from benchmarks.imdb_data import ASKED, Splits, as_prompt, clean, ordered_pairs, split_reviews
from benchmarks.imdb_table import FAILS, HOLDS, OPEN, Policy, apart, claims, higher, near, paired, table
from plumbline.data.dataset import LabelledText
from plumbline.errors import DataError

WORDS = 20


def review(number: int) -> LabelledText:
    sentence = f"Film number {number} has a story that I will not forget, whatever else may come."
    return LabelledText(text=" ".join([sentence] * 4), label=float(number % 2))


REVIEWS = [review(number) for number in range(60)]


def split(reviews: list[LabelledText], seed: int = 0) -> Splits:
    return split_reviews(reviews, seed=seed, prompts=10, heldout=5, tune=3, reviews_heldout=7, words=WORDS)


def number_of(row: dict[str, Any]) -> str:
    """Of the film: its first words are in each prompt, of three and more."""
    return (row.get("text") or row["prompt"].removeprefix(ASKED)).split()[2]


def test_no_review_is_on_two_sides_though_the_data_has_it_twice() -> None:
    twice = [*REVIEWS, *(LabelledText(text=f"  {one.text}<br />", label=one.label) for one in REVIEWS)]
    found = split(twice)
    sides = [getattr(found, side.name) for side in fields(found)]
    assert [len(side) for side in sides] == [5, 3, 10, 7, 35]
    assert all(not {*map(number_of, one)} & {*map(number_of, other)} for one, other in combinations(sides, 2))


def test_the_seed_alone_decides_whatever_the_order_of_the_file() -> None:
    assert split(REVIEWS) == split(REVIEWS[::-1])
    assert split(REVIEWS) != split(REVIEWS, seed=1)


def test_too_few_reviews_are_one_line() -> None:
    with pytest.raises(DataError, match=r"^21 different reviews are too few for 18 prompts, 7 held-out reviews"):
        split(REVIEWS[:21])
    with pytest.raises(DataError, match="some of either label"):
        split(REVIEWS[::2])


def test_a_target_is_whole_sentences_after_the_prompt() -> None:
    text = 'I saw it twice. It was good, "really good!" And then there came another one which'
    made = as_prompt(text, first=3, words=10)
    assert made == {"prompt": f"{ASKED}I saw it", "target": 'twice. It was good, "really good!"'}
    assert as_prompt(text, first=3, words=5) is None  # "twice." alone is too short, and no sentence else ends
    assert as_prompt("No end in sight here at all", first=3, words=10) is None


def test_html_breaks_are_spaces() -> None:
    assert clean("One.<br /><br>Two. \n") == "One. Two."


def drawn(prompt: str, answer: str, reward: float | None) -> dict[str, Any]:
    return {
        "step": 1,
        "prompt_id": prompt,
        "chosen": "the target",
        "rejected": answer,
        "chosen_ids": [0],
        "rejected_ids": [len(answer)],
        "chosen_reward": 9.0,
        "rejected_reward": reward,
        "chosen_finish_reason": None,
        "rejected_finish_reason": "stop",
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -float(len(answer)),
        "similarity": None,
    }


def test_pairs_are_ordered_by_the_reward() -> None:
    rows = [
        *(drawn("1", "bad", -1.0), drawn("1", "better", 0.5)),
        *(drawn("2", "one", 0.0), drawn("2", "other", 0.0)),
        *(drawn("3", "a", None), drawn("3", "ab", 1.0)),
        *(drawn("4", "finest", 2.0), drawn("4", "poor", -2.0)),
    ]
    first, last = ordered_pairs(rows)
    assert (first["prompt_id"], first["chosen"], first["rejected"]) == ("1", "better", "bad")
    assert (first["chosen_reward"], first["rejected_reward"]) == (0.5, -1.0)
    assert (first["chosen_ids"], first["rejected_ids"]) == ([6], [3])
    assert (first["ref_chosen_logps"], first["ref_rejected_logps"]) == (-6.0, -3.0)
    assert first["chosen_finish_reason"] == "stop"
    assert (last["chosen"], last["rejected"]) == ("finest", "poor")


def interval(mean: float, half: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 4}


def policy(rewards: list[float | None], ppl: float = 20.0, gap: float = 0.0, guided: float = 0.0) -> Policy:
    figures = {"PPL": ppl, "reward": interval(0.5), "gap": interval(gap), "guided": interval(guided), "tokens": 9.0}
    return Policy(figures=figures, rewards={str(i): value for i, value in enumerate(rewards)})


def test_differences_are_of_prompts_that_both_have_and_seeds_are_averaged_first() -> None:
    seeds = {
        0: {"ple": policy([1.0, 2.0, None, 5.0]), "sft": policy([0.0, 0.0, 0.0, None])},
        1: {"ple": policy([3.0, 2.0]), "sft": policy([0.0, 0.0])},
    }
    difference, each = paired(seeds, "ple", "sft")
    assert difference is not None
    assert (difference.mean, difference.n) == (2.0, 2)  # (1 + 3) / 2 and (2 + 2) / 2
    assert (difference.low, difference.high) == (2.0, 2.0)
    assert each == [1.5, 2.5]
    assert paired(seeds, "ple", "dpo") == (None, [])


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([[1.0, 1.1, 0.9], [0.5, 0.6, 0.4]], HOLDS),
        ([[-1.0, -1.1, -0.9], [-0.5, -0.6, -0.4]], FAILS),
        ([[1.0, -1.1, 0.2], [0.5, 0.6, -0.4]], OPEN),
        ([[3.0, 3.1, 2.9], [-0.1, -0.1, -0.1]], OPEN),  # clear of 0 in the mean, and a seed says the opposite
    ],
)
def test_a_claim_holds_where_the_interval_is_clear_of_0_and_no_seed_differs(
    ours: list[list[float | None]], verdict: str
) -> None:
    seeds = {i: {"ple": policy(one), "dpo": policy([0.0, 0.0, 0.0])} for i, one in enumerate(ours)}
    assert higher(seeds, "above", "ple", "dpo")[""] == verdict


def test_what_was_not_run_cannot_be_said() -> None:
    assert higher({0: {"ple": policy([1.0])}}, "above", "ple", "dpo")[""] == OPEN
    assert near({})[""] == OPEN
    assert apart({}, "gap", -1)[""] == OPEN


@pytest.mark.parametrize(
    ("perplexities", "verdict"), [((21.0, 22.0), HOLDS), ((25.0, 23.0), FAILS), ((21.0, 25.0), OPEN)]
)
def test_near_is_within_a_tenth_in_every_seed(perplexities: tuple[float, ...], verdict: str) -> None:
    seeds = {i: {"ple": policy([], ppl=ppl), "sft": policy([])} for i, ppl in enumerate(perplexities)}
    assert near(seeds)[""] == verdict


@pytest.mark.parametrize(("gap", "verdict"), [(0.3, HOLDS), (1.6, FAILS), (0.9, OPEN)])
def test_a_gap_shrinks_where_its_interval_is_below_the_other(gap: float, verdict: str) -> None:
    assert apart({0: {"ple": policy([], gap=gap), "sft": policy([], gap=1.0)}}, "gap", -1)[""] == verdict


def test_the_table_has_a_row_a_seed_and_policy_in_order_and_means() -> None:
    seeds = {0: {"ple": policy([1.0], ppl=20.0), "base": policy([1.0])}, 1: {"ple": policy([1.0], ppl=30.0)}}
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(seeds).splitlines()]
    assert head[:5] == ["seed", "policy", "PPL", "reward", "judge"]
    assert [row[:3] for row in rows] == [
        ["0", "base", "20"],
        ["0", "PLE", "20"],
        ["1", "PLE", "30"],
        ["mean", "base", "20"],
        ["mean", "PLE", "25"],
    ]
    assert rows[0][3] == "+0.500 [+0.400, +0.600]"
    assert rows[4][3] == "0.5"


def test_every_claim_has_a_line() -> None:
    assert claims({}).count("\n") == 13  # 12 claims under a head and a rule
    assert claims({}).count(OPEN) == 12
