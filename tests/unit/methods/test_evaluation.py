"""Evaluation's numbers against values worked out by hand or printed in statistical tables."""

import math

import pytest

from plumbline.methods.evaluation import (
    Interval,
    WinRate,
    bleu,
    corpus_ppl,
    data_accuracy,
    distinct_n,
    gap,
    markdown,
    mean_interval,
    paired_interval,
    reward_win_rate,
    table,
    win_rate,
)


def test_perplexity_is_of_the_corpus_and_not_a_mean_of_rows() -> None:
    # 4 tokens at 1/2 and 1 at 1/32: exp((4 ln 2 + 5 ln 2) / 5) = 2^1.8, where a mean of rows would give 17
    assert corpus_ppl([4 * math.log(2), 5 * math.log(2)], [4, 1]) == pytest.approx(2**1.8)
    with pytest.raises(ValueError, match="no tokens"):
        corpus_ppl([0.0], [0])
    with pytest.raises(ValueError, match="2 values beside 1"):
        corpus_ppl([1.0, 1.0], [1])


def test_bleu_is_a_share_of_the_whole_corpus() -> None:
    same = "the cat sat on the mat"
    assert bleu([same], [same]) == pytest.approx(1.0)
    # precisions 5/6, 3/5, 2/4, 1/3; no brevity penalty: (5/6 · 3/5 · 1/2 · 1/3)^(1/4) = (1/12)^(1/4)
    assert bleu(["the cat sat on a mat"], [same]) == pytest.approx((1 / 12) ** 0.25, abs=1e-6)
    with pytest.raises(ValueError, match="1 values beside 0"):
        bleu([same], [])


def test_a_corpus_that_repeats_itself_has_few_distinct_pairs() -> None:
    assert distinct_n(["a b c", "a b"]) == 2 / 3
    assert distinct_n(["A b", "a\tB"]) == 1 / 2, "words are compared in lower case, white space parts them"
    assert distinct_n(["a b", "c d"]) == 1.0, "no pair goes over the border of two texts"
    assert distinct_n(["a b c d"], 3) == 1.0 and distinct_n(["word", ""]) == 0.0


@pytest.mark.parametrize(
    ("n", "confidence", "t"),
    [(2, 0.95, 12.706), (3, 0.95, 4.303), (4, 0.95, 3.182), (11, 0.95, 2.228), (31, 0.95, 2.042), (11, 0.99, 3.169)],
)
def test_intervals_follow_the_t_table(n: int, confidence: float, t: float) -> None:
    values = [float(i) for i in range(n)]  # variance n(n + 1) / 12
    interval = mean_interval(values, confidence)
    half = t * math.sqrt(n * (n + 1) / 12 / n)
    assert interval.mean == pytest.approx((n - 1) / 2)
    assert interval.high - interval.mean == pytest.approx(half, rel=3e-4)
    assert interval.mean - interval.low == pytest.approx(half, rel=3e-4)
    assert interval.n == n


def test_large_samples_are_close_to_normal() -> None:
    interval = mean_interval([0.0, 1.0] * 1024)
    assert interval.high - 0.5 == pytest.approx(1.9611 * 0.5 / math.sqrt(2047), rel=1e-4)


def test_intervals_of_too_little() -> None:
    single = mean_interval([3.0])
    assert (single.mean, single.n) == (3.0, 1)
    assert math.isnan(single.low) and math.isnan(single.high)
    assert mean_interval([2.0, 2.0]) == Interval(mean=2.0, low=2.0, high=2.0, n=2)
    for values, problem in (([], "no values"), ([1.0, math.nan], "not all finite"), ([math.inf], "not all finite")):
        with pytest.raises(ValueError, match=problem):
            mean_interval(values)
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([1.0, 2.0], confidence=95)


def test_pairing_removes_what_prompts_have_in_common() -> None:
    before, after = [0.0, 10.0, 20.0], [1.0, 12.0, 23.0]
    interval = paired_interval(before, after)  # differences 1, 2, 3: deviation 1
    assert interval.mean == pytest.approx(2)
    assert interval.low == pytest.approx(2 - 4.3027 / math.sqrt(3), rel=1e-4)
    with pytest.raises(ValueError, match="3 values beside 2"):
        paired_interval(before, after[:2])


def test_win_rate_wants_both_orders() -> None:
    # ours first / theirs first: preferred in both, only as the first, only as the second, in neither
    judged = [(True, False), (True, True), (False, False), (False, True)]
    assert win_rate(judged) == WinRate(win=0.25, tie=0.5, lose=0.25, n=4)
    assert win_rate([(0.9, 0.2), (0.6, 0.6), (0.5, 0.5), (0.1, 0.8)]) == WinRate(win=0.25, tie=0.5, lose=0.25, n=4)
    with pytest.raises(ValueError, match="no comparisons"):
        win_rate([])


def test_reward_win_rate_counts_equal_as_half() -> None:
    assert reward_win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == pytest.approx(2.5 / 4)
    with pytest.raises(ValueError, match="NaN"):
        reward_win_rate([math.nan], [0.0])
    with pytest.raises(ValueError, match="no values"):
        reward_win_rate([], [])


def test_data_accuracy_wants_strictly_below() -> None:
    assert data_accuracy([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == pytest.approx(1 / 3)


def test_gap_is_guided_minus_plain() -> None:
    found = gap([0.0, 1.0], [1.0, 3.0])
    assert (found.plain.mean, found.guided.mean, found.gap.mean) == (0.5, 2.0, 1.5)


def test_tables_keep_the_order_of_columns() -> None:
    rows: list[dict[str, object]] = [{"policy": "sft", "ppl": 8.42123}, {"policy": "ple", "reward": 1, "ppl": 8.4}]
    frame = table(rows)
    assert list(frame.columns) == ["policy", "ppl", "reward"]
    assert frame["reward"].tolist() == [None, 1]
    assert markdown(rows).splitlines() == [
        "| policy |   ppl | reward |",
        "|--------|------:|-------:|",
        "| sft    | 8.421 |        |",
        "| ple    |   8.4 |      1 |",
    ]
    assert "a\\|b" in markdown([{"text": "a|b"}])
