"""Which side of a run is slow, learners or generators, and which keys of the config turn that: one sentence.

The report opens with it, and `plumbline run` ends with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

LITTLE = 0.25
"""Share of the time below which waiting is nothing to act on."""


def balance(events: Sequence[Mapping[str, Any]]) -> str:
    """The sentence; empty where no step was drawn and trained on.

    Shares are means over the steps of all pipelines that drew answers, weighted by the seconds that a step took.
    """
    steps = [
        (event["seconds"], event["learner_idle"], event["generator_idle"])
        for event in events
        if event.get("tokens_per_s")  # else nothing was drawn: given pairs, or parts that are read again
        and all(event.get(key) is not None for key in ("seconds", "learner_idle", "generator_idle"))
    ]
    seconds = sum(one for one, _, _ in steps)
    if not seconds:
        return ""
    learner = sum(one * share for one, share, _ in steps) / seconds
    generator = sum(one * share for one, _, share in steps) / seconds
    said = f"learners waited {learner:.0%} of the time for rollouts, generators stood idle {generator:.0%} of it"
    if max(learner, generator) < LITTLE:
        return f"Balanced: {said}."
    if min(learner, generator) >= LITTLE:
        turn = "a larger `max_staleness`, or `ahead` for methods that draw from π0, lets both work at once"
        return f"Both sides wait for each other: {said}; {turn}."
    if learner > generator:
        turn = "more `fleet.generator.replicas`, or fewer `generation.max_tokens`"
        return f"Generators are the slow side: {said}; {turn}."
    turn = "more `learner.workers`, or a larger `learner.micro_tokens` where memory is free"
    return f"Learners are the slow side: {said}; {turn}."
