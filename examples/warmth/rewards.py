"""Warmth by two lexicons: VADER's, which trains, and AFINN's, which only judges.

A reward is a function from answers to numbers; a config names it as ``examples.warmth.rewards:vader``.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache

from plumbline.records import ScoreRequest

_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


def vader(requests: Sequence[ScoreRequest]) -> list[float]:
    """VADER's compound score of a sentence, from -4 to 4 as in its lexicon; the mean over an answer's sentences."""
    polarity = _vader()
    return [_over_sentences(lambda sentence: 4 * polarity(sentence)["compound"], one.response) for one in requests]


def afinn(requests: Sequence[ScoreRequest]) -> list[float]:
    """AFINN's points of a sentence, the sum over its words, each from -5 to 5; the mean over an answer's sentences."""
    return [_over_sentences(_afinn(), one.response) for one in requests]


def _over_sentences(score: Callable[[str], float], text: str) -> float:
    sentences = [one for one in _BETWEEN_SENTENCES.split(text.strip()) if one]
    return sum(map(score, sentences)) / len(sentences) if sentences else 0.0


@cache
def _vader() -> Callable[[str], dict[str, float]]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer().polarity_scores


@cache
def _afinn() -> Callable[[str], float]:
    from afinn import Afinn

    return Afinn().score
