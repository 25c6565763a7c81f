"""Settings that would do nothing where they stand, and those that `deterministic` cannot have: each is refused by its
key, with what would be right.

A key counts as given where its value is not the default: a run keeps its config with all defaults written out.
`plumbline.config.tree` calls it, once every value is known to be in its bounds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from plumbline.config.data import ServiceReward, Source
from plumbline.config.hub import idle_keys
from plumbline.config.learner import FullPolicy
from plumbline.config.pipelines import Dlma, Frozen, MethodBase, Ple, Preference, RewardModel, SelfContrast, Sft
from plumbline.config.section import bounds

Config = Any
"""`plumbline.config.tree`'s, which calls this file."""

FILES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
Idle = Iterator[tuple[str, str]]
"""Keys without effect, and why."""


def check_effects(config: Config) -> None:
    """Raises ValueError for the first key that is given and does nothing, or leaves to chance what may not be."""
    for key, why in (*_idle(config), *(_chance(config) if config.deterministic else ())):
        raise ValueError(f"`{key}` {why}")


def _idle(config: Config) -> Idle:
    yield from _run(config)
    yield from _fleet(config)
    yield from _serve(config)
    yield from idle_keys(config)
    sources = [("data.train", config.data.train), ("data.heldout", config.data.heldout)]
    for i, one in enumerate(config.pipelines):
        key = f"pipelines.{i}"
        if isinstance(one, MethodBase):
            yield from _method(config, one, key)
        else:
            serves = isinstance(one, Sft) and not isinstance(one.policy, FullPolicy)
            why = "counts versions, and this pipeline makes one at its end; leave it out"
            yield from _given(one.learner, f"{key}.learner", ["keep_versions"], why, acts=serves)
        if isinstance(one, Preference):
            sources.append((f"{key}.pairs", one.pairs))
    if config.sft:
        yield from _given(config.sft.learner, "sft.learner", ["keep_versions"], "counts versions, and `sft` makes one")
    for key, source in sources:
        if source is not None:
            yield from _source(source, key)


def _given(section: BaseModel, key: str, names: list[str] | None, why: str = "", *, acts: bool = False) -> Idle:
    """Those of `names` (None: of all keys) that are given in a section where they do nothing."""
    fields = type(section).model_fields
    for name in () if acts else fields if names is None else names:
        if getattr(section, name) != fields[name].get_default(call_default_factory=True):
            yield f"{key}.{name}", why


def _run(config: Config) -> Idle:
    methods, heldout = config.methods, config.data.heldout
    rewards = [p for p in config.pipelines if isinstance(p, RewardModel)]
    skips, why = config.data.on_bad_row == "skip", "is what `on_bad_row: skip` may leave out; set that, or leave it out"
    yield from _given(config.data, "data", ["max_bad_rows"], why, acts=skips)
    if config.sft and len(rewards) == len(config.pipelines):
        yield (
            "sft",
            "learns prompts with targets, which the rows of `reward` pipelines are not; give it a run of its own",
        )
    if config.evaluation and heldout is None:
        yield "evaluation", "asks held-out prompts; give `data.heldout`, or leave it out"
    if config.evaluation and not (methods and config.served):
        yield "evaluation", "compares what pipelines that generate have trained, and none does here; leave it out"
    if heldout and not (config.evaluation or rewards):
        yield "data.heldout", "is what `evaluation` asks; add `evaluation: {}`, or leave it out"
    if config.embedder and not any(one.embeds for one in methods):
        yield "embedder", "is asked by `self_contrast` with `filter: true` and its own samples alone; leave it out"
    if config.reward and not methods:
        yield "reward", "scores answers, and no pipeline generates any; leave it out"
    if len(rewards) == len(config.pipelines):
        why = "bounds prompts, which `reward` pipelines do not read: they have a `max_len` of their own; leave it out"
        yield from _given(config.model, "model", ["max_len"], why)
        yield from _given(config.data, "data", ["max_prompt_tokens"], why)


def _fleet(config: Config) -> Idle:
    fleet, methods = config.fleet, config.methods
    generator, reference = fleet.generator, fleet.reference
    none = "is of generators, and no pipeline generates; leave it out"
    if not methods:
        yield from _given(generator, "fleet.generator", None, none)
        yield from _given(fleet, "fleet", ["engine", "sync_tolerance"], none)
    grows = isinstance(generator.replicas, tuple)
    why = "is of a number that changes; give `fleet.generator.replicas` bounds, such as [1, 4], or leave it out"
    yield from _given(generator, "fleet.generator", ["scale_up_after", "scale_down_after"], why, acts=grows)
    if fleet.engine == "transformers":
        why = "is vLLM's cache, and `fleet.engine` is transformers; leave it out"
        yield from _given(generator, "fleet.generator", ["kv_cache_gib", "memory_share"], why)
    if fleet.device == "cuda":
        yield from _given(generator, "fleet.generator", ["kv_cache_gib"], "counts on CPUs; give `memory_share`")
    if fleet.device == "cpu":
        yield from _given(generator, "fleet.generator", ["memory_share"], "counts on GPUs; give `kv_cache_gib`")
    scores = config.rewards or any(isinstance(p, RewardModel) for p in config.pipelines)
    yield from _given(fleet.scorer, "fleet.scorer", None, "is of rewards, and there is none", acts=bool(scores))
    asked = any(isinstance(one, Preference) for one in methods)
    why = "is of the reference, which only `dlma` and `self_contrast` ask; leave it out"
    yield from _given(reference, "fleet.reference", None, why, acts=asked)
    if reference.replicas == "learner":
        why = "is of copies of the reference, and the learners answer in their place; leave one of them out"
        yield from _given(reference, "fleet.reference", ["cpus", "gpus", "resources", "batch_tokens"], why)


def _serve(config: Config) -> Idle:
    """`plumbline serve` reads the other keys of the section, whatever `enabled` says."""
    serve = config.serve
    if serve.enabled and not config.methods:
        yield "serve.enabled", "answers by what pipelines that generate train, and there is none; leave it out"
    if not serve.enabled:
        why = "is of an endpoint beside the training, and `serve.enabled` is false; set it, or leave this out"
        yield from _given(serve, "serve", ["placement", "gate", "seats"], why)
    if serve.placement == "replicas":
        yield from _given(serve, "serve", ["seats"], "is of the run's generators, and `serve.placement` is replicas")


def _method(config: Config, one: MethodBase, key: str) -> Idle:
    given = isinstance(one, Preference) and one.pairs is not None
    alone = len(config.methods) == 1 and not config.serve.gate
    why = "weighs pipelines that wait for the same generators, and there is no other; leave it out"
    yield from _given(one, key, ["share"], why, acts=not alone)
    if given:
        evaluates = config.evaluation is not None and one is config.methods[0]
        why = "is of answers that are drawn, and `pairs` gives them; leave it out"
        yield from _given(one, key, ["share"], why)
        asked = evaluates and config.evaluation is not None and config.evaluation.generation is None
        yield from _given(one, key, ["generation"], why, acts=asked)
        if isinstance(one, SelfContrast):
            yield from _given(one, key, ["samples", "keep", "filter"], why)
        if isinstance(one, Dlma):
            yield from _given(one, key, ["sides", "scoring", "eos_in_margin"], why)
            yield from _given(one, key, ["contrast"], why, acts=evaluates)
    elif isinstance(one, SelfContrast) and not one.filter:
        yield from _given(one, key, ["keep"], "is the share that the filter keeps, and `filter` is false")
    if not one.trains:
        why = "is of training, and `train` is false; leave it out"
        trained = {"epochs", "policy", "beta", "margin_weight"}
        yield from _given(one, key, [name for name in type(one).model_fields if name in trained], why)
        yield from _given(one.learner, f"{key}.learner", None, why)
    if isinstance(one, Ple):
        yield from _ple(one, key)
    if isinstance(one, Dlma):
        yield from _dlma(one, key)


def _ple(one: Ple, key: str) -> Idle:
    if not one.rank_weight and not one.sft_weight:
        yield f"{key}.sft_weight", "is 0 and `rank_weight` too: nothing would be learnt; give one of them"
    why = "is of the ranking loss, which `rank_weight: 0` leaves out"
    yield from _given(one, key, ["hinge"], why, acts=one.rank_weight > 0)
    why = "is of the weighted SFT, which `sft_weight: 0` leaves out"
    yield from _given(one, key, ["length_normalize_sft"], why, acts=one.sft_weight > 0)


def _dlma(one: Dlma, key: str) -> Idle:
    for name, sides in (("contrast", one.contrast), ("scoring", one.scoring)):
        if sides and sides.preset and sides.positive is not None and sides.negative is not None:
            yield f"{key}.{name}.preset", "is replaced on both sides, by `positive` and `negative`; leave it out"
    if one.pairs:
        why = "picks rows of a file, and the `pairs` of dlma are parts, which are taken whole; leave it out"
        yield from _given(one.pairs, f"{key}.pairs", ["split", "columns", "where", "limit"], why)


def _source(source: Source, key: str) -> Idle:
    if str(source.path).lower().endswith(FILES) and not Path(source.path).is_dir():
        yield from _given(source, key, ["split"], "is of a dataset, and this is a file; leave it out")


def _chance(config: Config) -> Idle:
    """What would make two runs of one config differ, by when something happened to arrive."""
    fleet, replicas = config.fleet, config.fleet.generator.replicas
    if replicas != "auto" and bounds(replicas)[1] > 1:
        yield "fleet.generator.replicas", "shares answers out as generators happen to be free; `deterministic` has 1"
    if fleet.reference.cache is not None:
        why = "is what other runs computed, and theirs may differ in the last digit; `deterministic` keeps its own"
        yield "fleet.reference.cache", why
    if config.serve.enabled:
        yield "serve.enabled", "has users' requests among the rollouts'; leave it or `deterministic` out"
    for key, reward in config.rewards.items():
        if isinstance(reward, ServiceReward):
            yield f"{key}.url", "may answer otherwise the next time it is asked; leave `deterministic` out"
    if len(config.methods) > 1:
        i = config.pipelines.index(config.methods[1])
        yield f"pipelines.{i}", "asks the generator beside another, in no fixed order; `deterministic` has one of them"
    sections = [(f"pipelines.{i}", one) for i, one in enumerate(config.pipelines)]
    for key, one in [*sections, *([("sft", config.sft)] if config.sft else [])]:
        if bounds(one.learner.workers) != (1, 1):
            yield f"{key}.learner.workers", "sums gradients in an order of its own; `deterministic` has 1"
        if one.learner.strategy != "torch":
            yield f"{key}.learner.strategy", "sums gradients in an order of its own; `deterministic` has torch"
        if isinstance(one, MethodBase) and one.generation.stop and fleet.engine != "transformers":
            why = "is found once more was decoded, by chance how much; leave it out, or take `engine: transformers`"
            yield f"{key}.generation.stop", why
        why = "draws while the learner trains, and `deterministic` has them take turns; leave it out"
        yield from _given(one, key, ["ahead"], why, acts=not isinstance(one, Frozen) or one.ahead == 1)
        yield from _given(one, key, ["max_staleness"], why, acts=not isinstance(one, Ple) or one.max_staleness == 0)
