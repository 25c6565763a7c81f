"""Which figures of a run's events are drawn, which of them share a plot, and what to look for in each. Data only.

Read by `plumbline.report.plots`, which draws them, and `plumbline.report.files`, which checks that they are numbers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One figure of an event in a plot; `low` and `high` are the figures of its band."""

    figure: str
    label: str = ""
    dash: str = "solid"
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A plot: figures of one unit, of all pipelines that have them; a sentence counts where one of its figures does."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    captions: tuple[tuple[str, str], ...]
    over_time: bool = False  # noisy figures of the machine, over time rather than steps, with a running mean
    share: bool = False
    apart: bool = False  # a chart for each pipeline: their scales differ, or their lines would cross too often

    @property
    def figures(self) -> list[str]:
        """Every figure that it draws."""
        return [f for curve in self.curves for f in (curve.figure, curve.low, curve.high) if f is not None]


KINDS = (
    Kind(
        title="Rewards of sampled answers",
        unit="reward",
        curves=(
            Curve(figure="reward_plain", label="plain"),
            Curve(figure="reward_guided", label="guided", dash="dashed"),
            Curve(figure="reward_mean", label="mean of the samples"),
            Curve(figure="reward_best", label="best of the samples", dash="dashed"),
        ),
        captions=(
            ("reward_plain", "Plain answers should rise towards the guided ones."),
            ("reward_mean", "The best of the samples is what RAFT learns."),
        ),
    ),
    Kind(
        title="Gap and threshold τ",
        unit="reward",
        curves=(Curve(figure="gap", label="gap, guided − plain"), Curve(figure="tau", label="τ", dash="dotted")),
        captions=(("gap", "Should shrink; samples with a gap above τ are ranked, the others weighted."),),
    ),
    Kind(
        title="Rewards of training pairs",
        unit="reward",
        curves=(
            Curve(figure="reward_chosen", label="chosen"),
            Curve(figure="reward_target", label="target"),
            Curve(figure="reward_rejected", label="rejected", dash="dashed"),
        ),
        captions=(
            ("reward_rejected", "The further the rejected answers lie below the others, the cleaner the pairs."),
        ),
    ),
    Kind(
        title="Self-reward margins",
        unit="margin R, nats",
        curves=(
            Curve(figure="margin_q50", label="median, 10–90 % band", low="margin_q10", high="margin_q90"),
            Curve(figure="margin_mean", label="mean", dash="dotted"),
        ),
        captions=(("margin_", "Most of the band should lie above 0, where the model agrees with its prompts."),),
    ),
    Kind(
        title="Similarity of negatives to the target",
        unit="cosine",
        curves=(
            Curve(figure="similarity_q50", label="median, 10–90 % band", low="similarity_q10", high="similarity_q90"),
        ),
        captions=(("similarity_", "Steady, and well below 1: near it a negative is as good as its target."),),
    ),
    Kind(
        title="Pairs in the right order",
        unit="share of pairs",
        share=True,
        curves=(
            Curve(figure="accuracy", label="by the model in training"),
            Curve(figure="agreement", label="margin agrees with the reward", dash="dashed"),
            Curve(figure="data_accuracy", label="rejected below the target", dash="dashed"),
        ),
        captions=(
            ("accuracy", "Solid should rise from 50 %."),
            ("agreement", "Dashed is how clean the data is."),
            ("data_accuracy", "Dashed is how clean the data is."),
        ),
    ),
    Kind(
        title="What filters and bounds take",
        unit="share",
        share=True,
        curves=(
            Curve(figure="rank_share", label="gap above τ"),
            Curve(figure="retention", label="prompts kept"),
            Curve(figure="margin_negative_share", label="margin below 0"),
            Curve(figure="clamp_saturation", label="margin at its bound", dash="dotted"),
        ),
        captions=(
            ("rank_share", "Above τ: should rise as τ falls."),
            ("retention", "Kept: falls where samples repeat."),
            ("clamp_saturation", "At its bound: should stay near 0."),
        ),
    ),
    Kind(
        title="Throughput",
        unit="tokens per second",
        over_time=True,
        curves=(Curve(figure="tokens_per_s"),),
        captions=(("tokens_per_s", "Tokens sampled, or trained on by `sft` and `reward`; it should stay level."),),
    ),
    Kind(
        title="Speed of learners",
        unit="tokens per second",
        over_time=True,
        curves=(Curve(figure="learner_tokens_per_s"),),
        captions=(("", "Tokens computed in training, a prompt once for all its answers; waiting is left out."),),
    ),
    Kind(
        title="Cards in use",
        unit="share",
        share=True,
        over_time=True,
        apart=True,
        curves=(
            Curve(figure="mfu", label="MFU of the learner"),
            Curve(figure="learner_gpu_busy", label="learner's GPUs busy", dash="dashed"),
            Curve(figure="generator_gpu_busy", label="generators' GPUs busy", dash="dotted"),
        ),
        captions=(
            ("mfu", "MFU: of what the cards could compute in bfloat16, what the model needs."),
            ("learner_gpu_busy", "Busy: a kernel ran, however small; what waits is not busy."),
        ),
    ),
    Kind(
        title="Memory of cards",
        unit="GiB in use",
        over_time=True,
        apart=True,
        curves=(
            Curve(figure="learner_gpu_gib", label="learner"),
            Curve(figure="generator_gpu_gib", label="generators", dash="dashed"),
        ),
        captions=(
            (
                "",
                "Of each side's cards, whoever takes it: larger micro-batches can use what is free.",
            ),
        ),
    ),
    Kind(
        title="Pool in use",
        unit="share in use",
        share=True,
        over_time=True,
        curves=(Curve(figure="utilisation"),),
        captions=(("utilisation", "Near 100 % the generators are the bottleneck; low, they wait for requests."),),
    ),
    Kind(
        title="Idle shares",
        unit="share of time idle",
        share=True,
        over_time=True,
        apart=True,
        curves=(
            Curve(figure="learner_idle", label="learner"),
            Curve(figure="generator_idle", label="generators", dash="dashed"),
        ),
        captions=(("", "What idles waits for the other: give the busier one more cores or GPUs."),),
    ),
    Kind(
        title="Losses",
        unit="loss",
        apart=True,
        curves=(Curve(figure="loss"),),
        captions=(("loss", "Steady or falling, without jumps; each pipeline has a scale of its own."),),
    ),
)
_WHOLE = {"Rewards of sampled answers", "Rewards of training pairs"}
FIGURES = frozenset(figure for kind in KINDS for figure in kind.figures)
"""The figures of an event that are drawn: each is a number or null."""

_PART = re.compile(r"(reward_[a-z]+)\.([A-Za-z0-9][\w.-]*)", re.ASCII)


def is_part(figure: str) -> bool:
    """Whether a figure of an event is what one part of a reward gave, such as ``reward_plain.polite``."""
    return _PART.fullmatch(figure) is not None


def kinds_of_parts(figures: Iterable[str]) -> list[Kind]:
    """A plot for each part of a reward that is a sum, by the figures that events have of it."""
    curves = {curve.figure: curve for kind in KINDS if kind.title in _WHOLE for curve in kind.curves}
    found: dict[str, list[Curve]] = {}
    for match in filter(None, map(_PART.fullmatch, figures)):
        if match[1] in curves:
            found.setdefault(match[2], []).append(replace(curves[match[1]], figure=match[0]))
    return [
        Kind(
            title=f"Part of the reward: {name}",
            unit="reward, before its weight",
            curves=tuple(own),
            captions=(("", "What moves while the sum stands still is paid for by the other parts."),),
        )
        for name, own in found.items()
    ]
