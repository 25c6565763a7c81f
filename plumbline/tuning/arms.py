"""Arms of a tuning: copies of a pipeline that differ in a rate, and the config of a run of some of them side by side.

`plumbline.tuning.series` calls it. Nothing is read or written here.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline.config.data import Source
from plumbline.config.file import parse_config
from plumbline.config.hub import hub_models
from plumbline.config.learner import LoraPolicy
from plumbline.config.pipelines import (
    MethodBase,
    MethodSection,
    Pipeline,
    Ple,
    Preference,
    RewardModel,
    SelfContrast,
    Sft,
)
from plumbline.config.tree import Config
from plumbline.errors import ConfigError, UserError

Tuned = MethodSection | Sft
"""What trains a policy."""
KINDS: Mapping[str, tuple[type, ...]] = {"lr": (MethodBase, Sft), "beta": (Preference,), "tau0": (Ple,)}
"""What may be tuned, and of which pipelines."""
HALF_DECADES = range(-3, 4)
"""Learning rates that are tried by default, in factors of √10 around the config's: what a rate reaches changes little
within a factor of two, and a fit of ten steps favours rates up to three times those that win in a hundred. So one
neighbour of the best is still good, and half of seven keeps both."""
MOST_ARMS = 16
"""Each is a learner of its own beside the others."""
DRAWING = ("share", "generation", "contrast", "sides", "scoring", "eos_in_margin", "samples", "keep", "filter")
"""What says how pairs are drawn, and nothing of how they are learnt."""
LEARNING = ("share", "learner", "policy", "epochs", "beta", "margin_weight")
"""What says how pairs are learnt, and nothing of how they are drawn; with what weighs the one against others."""
GENERATES = "generators"
"""The name of a pipeline that trains nothing: `sft` generates nothing, and its adapters are to be asked for answers."""
_ASKS = {"type": "raft", "name": GENERATES, "train": False, "steps": 1, "batch_size": 1, "samples": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A copy of a pipeline. `values` are by keys of `KINDS`; `lr` is always there."""

    name: str
    values: Mapping[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{key} {shown(value)}" for key, value in self.values.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningData:
    """What rungs read in place of the config's own files: `prompts` held-out rows, and rows of an `sft` to cut from.

    Where rows of `data.train` are among the former (`aside`), every rung learns from `train`, which is without them.
    """

    heldout: Path
    prompts: int
    train: Path
    aside: bool = False


def shown(value: float) -> str:
    """As short as it reads back: 1e-3, 3.2e-4, 0.05."""
    text = f"{value:g}".replace("e+", "e")
    if value < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text


def rates(lr: float) -> list[float]:
    """The learning rates to try around one, ascending, to two digits, none above 1."""
    around = [float(f"{lr * 10 ** (step / 2):.2g}") for step in HALF_DECADES]
    return [rate for rate in around if rate <= 1]


def parse_over(texts: Sequence[str]) -> dict[str, list[float]]:
    """``lr=1e-4,3e-4`` and the like, values ascending. Raises UserError."""
    over: dict[str, list[float]] = {}
    for text in texts:
        key, _, given = text.partition("=")
        try:
            values = sorted({float(one) for one in given.split(",")})
        except ValueError:
            values = []
        if key not in KINDS or not values or not all(0 < value < math.inf for value in values):
            raise UserError(
                f"--over {text}: write KEY=VALUE,VALUE with a key of {', '.join(KINDS)} and numbers above 0, such as "
                "lr=1e-4,3e-4,1e-3"
            )
        if key in over:
            raise UserError(f"--over {text}: {key} is there twice; give all of its values at once")
        over[key] = values
    return over


def tuned_pipelines(config: Config, names: Sequence[str], origin: str) -> list[Tuned]:
    """Those that are named, or all that can be tuned. Raises UserError."""
    own = {section.name: section for section in config.pipelines}
    for name in names:
        if name not in own:
            raise UserError(f"--pipeline {name}: {origin} has no such pipeline; it has {', '.join(own)}")
        if why := _unfit(own[name]):
            raise UserError(f"--pipeline {name}: {why}")
    asked = [own[name] for name in dict.fromkeys(names)] or [one for one in config.pipelines if not _unfit(one)]
    if not asked:
        raise ConfigError(f"{origin}: no pipeline that can be tuned: {_unfit(config.pipelines[0])}")
    return [one for one in asked if not isinstance(one, RewardModel)]


def _unfit(section: Pipeline) -> str:
    """Why a pipeline cannot be tuned; nothing where it can."""
    if isinstance(section, RewardModel):
        return "a reward model gives no answers that could be judged; name a pipeline that trains a policy"
    if not section.trains:
        return "`train: false` only makes parts, and has no rate"
    if not isinstance(section.policy, LoraPolicy):
        return "all of its weights are trained, and arms share one base; write `policy: {type: lora}`"
    return ""


def arms_of(section: Tuned, over: Mapping[str, Sequence[float]]) -> list[Arm]:
    """All combinations of what `over` has for this kind of pipeline, rates ascending. Raises UserError."""
    asked = {"lr": rates(section.learner.lr), **over}
    asked = {key: values for key, values in asked.items() if isinstance(section, KINDS[key])}
    arms = []
    for values in itertools.product(*asked.values()):
        named = "".join(f"-{key}-{shown(value)}" for key, value in zip(asked, values, strict=True))
        name = f"{section.name[: 64 - len(named)]}{named}"
        arms.append(Arm(name=name, values=dict(zip(asked, values, strict=True))))
    if not 2 <= len(arms) <= MOST_ARMS or len({arm.name for arm in arms}) < len(arms):
        what = " x ".join(f"{len(values)} of {key}" for key, values in asked.items())
        raise UserError(
            f"--over: {what} of {section.name} should be 2 to {MOST_ARMS} different settings together; each is a "
            "learner of its own beside the others"
        )
    return arms


def check_over(over: Mapping[str, object], sections: Sequence[Tuned]) -> None:
    """Raises UserError where a key is of none of the pipelines that are tuned."""
    for key in over:
        if not any(isinstance(section, KINDS[key]) for section in sections):
            which = ", ".join(section.name for section in sections)
            raise UserError(f"--over {key}=…: no `{key}` in {which}; leave it out")


def draws(section: Tuned) -> bool:
    """Whether all arms would draw the very same pairs from π0: then they are drawn once (`draw_config`). Not where π0
    is quantised, which only a learner's section can say."""
    return isinstance(section, Preference) and section.pairs is None and not section.learner.quantize


def base_config(config: Config, data: TuningData) -> Config:
    """The config of a run that makes π0 as the `sft` stage does, and asks it for next to nothing."""
    tree = _without_judging(config, data)
    tree.pop("embedder", None)
    return _parsed(config, {**tree, "pipelines": [{**_ASKS, "generation": {"max_tokens": 1}}]}, "tune")


def draw_config(config: Config, section: Tuned, steps: int, data: TuningData, base: str | None) -> Config:
    """The config of a run that draws what all arms of a rung learn from. The arguments are those of `rung_config`."""
    tree = _of_section(_without_judging(config, data), config, section, base)
    if config.fleet.reference.replicas == "learner":  # none is there
        tree["fleet"]["reference"].pop("replicas")
    own = {key: value for key, value in _given(section).items() if key not in LEARNING}
    return _parsed(config, {**tree, "pipelines": [{**own, "steps": steps, "train": False}]}, f"tune {section.name}")


def rung_config(
    config: Config,
    section: Tuned,
    arms: Sequence[Arm],
    steps: int,
    full: int,
    data: TuningData,
    base: str | None,
    pairs: Path | None = None,
) -> Config:
    """The config of a run of `arms` side by side: what only the whole run is for is left out of it.

    Args:
        steps: parts that each is trained on, of the `full` that the pipeline has.
        base: π0's directory, where the config has an `sft` stage (`base_config`).
        pairs: directory of what was drawn for all arms, where the section `draws`.

    Raises:
        ConfigError: a value of an arm is out of its bounds.
    """
    if pairs is not None:
        section = section.model_copy(update={"pairs": Source(path=str(pairs))})
    tree = _of_section(_without_whole(config, data), config, section, base)
    assert config.evaluation is not None
    generation = _given(config.evaluation.generation or config.methods[0].generation)
    pipelines = [_arm(section, arm, steps, full) for arm in arms]
    if isinstance(section, Sft):
        tree["data"]["train"] = {"path": str(data.train), "limit": steps * section.learner.batch_size}
        pipelines.append({**_ASKS, "generation": generation})
    tree["data"]["heldout"] = {"path": str(data.heldout)}
    tree |= {
        "evaluation": {"prompts": data.prompts, "generation": generation},  # no judge: it is for the end alone
        "pipelines": pipelines,
    }
    return _parsed(config, tree, f"tune {section.name}")


def _parsed(config: Config, tree: dict[str, Any], origin: str) -> Config:
    """A tree that was cut from a config's: commits of models that are no longer named are left out."""

    def named(key: str) -> Any:
        found: Any = tree
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    left = {one.label for one in hub_models(config) if named(one.key) == one.name}
    commits = {label: commit for label, commit in config.commits.items() if label in left}
    return parse_config({**tree, "commits": commits}, origin)


def _without_judging(config: Config, data: TuningData) -> dict[str, Any]:
    """As `_without_whole`, and without what an evaluation reads."""
    tree = _without_whole(config, data)
    tree.pop("evaluation", None)
    tree["data"].pop("heldout", None)
    return tree


def _without_whole(config: Config, data: TuningData) -> dict[str, Any]:
    """What was given but for what only the whole run is for."""
    tree = _given(config)
    for key in ("deterministic", "storage_path", "serve"):
        tree.pop(key, None)
    if data.aside:
        tree["data"]["train"] = {"path": str(data.train)}
    return {**tree, "tracking": {"tensorboard": False}}


def _of_section(tree: dict[str, Any], config: Config, section: Tuned, base: str | None) -> dict[str, Any]:
    """Without what only other pipelines than the section are for, from the π0 of a tuning."""
    if not isinstance(section, SelfContrast) or not section.embeds:
        tree.pop("embedder", None)
    if not isinstance(section, Preference):
        tree.get("fleet", {}).pop("reference", None)
    if base is not None:
        tree.pop("sft", None)
        tree["model"] = _given(config.model.at(base))
    return tree


def _arm(section: Tuned, arm: Arm, steps: int, full: int) -> dict[str, Any]:
    tree: dict[str, Any] = {**_given(section), "name": arm.name}
    if isinstance(section, MethodBase):  # all arms on the same
        tree["draws_as"] = section.draws_as or section.name
    learner = {**tree.get("learner", {}), "lr": arm.values["lr"], "keep_versions": 1}
    if section.learner.warmup:
        learner["warmup"] = round(section.learner.warmup * steps / full)
    if not isinstance(section, Sft):
        tree["steps"] = steps
    if isinstance(section, Preference) and section.pairs:  # of the evaluation's answers alone, which has its own here
        tree = {key: value for key, value in tree.items() if key not in DRAWING}
    return {**tree, **{key: value for key, value in arm.values.items() if key != "lr"}, "learner": learner}


def with_values(config: Config, found: Mapping[str, Arm]) -> Config:
    """The config with what was found in place, by the names of pipelines."""
    pipelines = []
    for section in config.pipelines:
        if arm := found.get(section.name):
            learner = section.learner.model_copy(update={"lr": arm.values["lr"]})
            others = {key: value for key, value in arm.values.items() if key != "lr"}
            section = section.model_copy(update={**others, "learner": learner})
        pipelines.append(section)
    return config.model_copy(update={"pipelines": pipelines})


def _given(section: Any) -> dict[str, Any]:
    """What of a section was given, without defaults."""
    return section.model_dump(mode="json", exclude_unset=True, exclude_none=True)
