"""The gate: which proved versions are promoted, by figures on held-out prompts.

The first comparison is π0's own; a version is promoted where it is no worse than the promoted one, and not too far from
π0, within the bounds of `serve.gate`. What is refused is an event too, with the reason.
"""

import asyncio
import statistics
from collections.abc import Mapping

from pipelines.context import Context
from pipelines.evaluate import Answers, answers_of, evaluation_principle, finite, finite_or_none, heldout_prompts
from plumbline.config.serving import Gate
from plumbline.errors import PlumblineError
from plumbline.records import PolicyRef, Prompt
from plumbline.runs.evaluated import keep_answers
from plumbline.runs.promotions import Promotion, promote, promoted

Figures = Mapping[str, float]


class Gatekeeper:
    """Promotes versions of all policies of a run, one look at a time; of a policy's that wait, the newest.

    A `pipelines.context.Promoter`.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._gate = context.config.serve.gate
        self._looking = asyncio.Lock()
        self._waiting: dict[str, PolicyRef] = {}
        self._prompts: list[Prompt] = []
        self._seen: dict[PolicyRef, Figures] = {}
        self._looks: set[asyncio.Task[None]] = set()
        self._undecided: set[PolicyRef] = set()

    def offer(self, ref: PolicyRef, *, last: bool) -> None:
        """A version was proved by all generators; `last`: of its run. It is looked at beside the training."""
        if self._gate is None:
            promote(self._context.run_dir, Promotion(ref=ref, by="proof"))
        elif ref.version % self._gate.every == 0 or last:
            self._waiting[ref.policy] = ref
            self._undecided.add(ref)
            look = asyncio.create_task(self._turn(self._gate, ref))
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)

    def looks_at(self, policy: str) -> set[int]:
        """See `pipelines.context.Promoter`."""
        return {ref.version for ref in self._undecided if ref.policy == policy}

    async def finish(self) -> None:
        """Wait for the looks that are still to come."""
        await asyncio.gather(*self._looks)

    async def _turn(self, gate: Gate, ref: PolicyRef) -> None:
        async with self._looking:
            try:
                if self._waiting.get(ref.policy) == ref:
                    await self._look(gate, ref)
            except PlumblineError as error:
                self._context.events.say(f"not promoted {ref}: it could not be looked at ({error})")
            finally:
                self._undecided.discard(ref)

    async def _look(self, gate: Gate, ref: PolicyRef) -> None:
        past = promoted(self._context.run_dir, ref.policy)
        before = PolicyRef(policy=ref.policy, version=past[-1]) if past and past[-1] else PolicyRef()
        compared = (PolicyRef(), before, ref)
        base, present, new = [await self._figures(gate, one) for one in compared]
        self._seen = {one: seen for one, seen in self._seen.items() if one in compared or one.policy != ref.policy}
        reason = refusal(gate, new, present, base)
        figures = {"new": new, "promoted": present, "base": base}
        if reason is None:
            promote(self._context.run_dir, Promotion(ref=ref, by="gate", figures=figures))
            self._context.events.say(f"promoted {ref}: {told(new)}")
        else:
            event = {"pipeline": "serve", "policy": ref.policy, "version": ref.version, "refused": reason}
            self._context.events.write({**event, "figures": figures})
            self._context.events.say(f"not promoted {ref}: {reason}")

    async def _figures(self, gate: Gate, ref: PolicyRef) -> Figures:
        if ref not in self._seen:
            config = self._context.config
            assert config.evaluation is not None
            self._prompts = self._prompts or (await asyncio.to_thread(heldout_prompts, self._context))[: gate.prompts]
            settings = config.evaluation.generation or config.methods[0].generation
            answers = await answers_of(self._context, ref, self._prompts, settings, evaluation_principle(config))
            who = str(ref) if ref.version else "base"
            keep_answers(self._context.run_dir, who, self._prompts, answers.plain, finite_or_none(answers.rewards))
            self._seen[ref] = figures_of(answers)
        return self._seen[ref]


def figures_of(answers: Answers) -> Figures:
    """Means of what there is: reward, gap, PPL, length. Answers without a finite score count for neither mean."""
    found = {"length": statistics.fmean(answers.lengths)}
    if answers.ppl is not None:
        found["ppl"] = answers.ppl
    rewards = [r for r in answers.rewards if finite(r)]
    if rewards:
        found["reward"] = statistics.fmean(rewards)
    gaps = [b - a for a, b in zip(answers.rewards, answers.guided_rewards, strict=False) if finite(a, b)]
    if gaps:
        found["gap"] = statistics.fmean(gaps)
    return found


def refusal(gate: Gate, new: Figures, present: Figures, base: Figures) -> str | None:
    """Why a version is not promoted, in one line; None where it is."""
    if any(not finite(value) for value in new.values()):
        return "a figure is not finite"
    bounds: list[tuple[str, float, float]] = []  # what, at least, at most
    inf = float("inf")
    if "reward" in present:
        bounds.append(("reward", present["reward"] - gate.max_reward_drop, inf))
    if "gap" in present and gate.max_gap_rise is not None:
        bounds.append(("gap", -inf, present["gap"] + gate.max_gap_rise))
    if "ppl" in base:
        bounds.append(("ppl", -inf, base["ppl"] * (1 + gate.max_ppl_rise)))
    bounds.append(("length", base["length"] * gate.length[0], base["length"] * gate.length[1]))
    for name, least, most in bounds:
        value = new.get(name)
        if value is None:
            return f"it has no {name}: no answer could be scored"
        if value < least:
            return f"its {name} is {value:.4g}, below {least:.4g}"
        if value > most:
            return f"its {name} is {value:.4g}, above {most:.4g}"
    return None


def told(figures: Figures) -> str:
    """Figures in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
