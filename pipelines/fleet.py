"""What the pipelines of a run share, made from its config: the context, and the fleet of actors in it.

`pipelines.run` calls it before they start, and again for each model that `plumbline evaluate` compares.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.cluster import free
from actors.embedder import EmbedderSpec
from actors.engines.seam import EngineSpec, engine_spec
from actors.engines.start import resolve_engine
from actors.learning.frozen import FrozenSpec
from actors.reference import ReferenceSpec
from actors.scorer import ScorerSpec
from actors.spawn import Fleet, ask, start_fleet
from pipelines.autoscaler import autoscale
from pipelines.context import Context, EventLog
from pipelines.pool import Pool
from plumbline.config.data import ClassifierReward, ServiceReward, SingleReward
from plumbline.config.demand import beside_sft, reference_replicas
from plumbline.config.pipelines import Preference
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.doctor import Checked
from plumbline.models.logp_cache import model_fingerprint
from plumbline.records import TokenGroup
from plumbline.runs.disk import user_cache
from plumbline.runs.policies import model_path
from plumbline.runs.storage import Storage


def make_context(run_dir: Path, checked: Checked, storage: Storage, events: EventLog) -> Context:
    """What all pipelines share, with an empty fleet, by the config that was placed."""
    config = checked.placed.plan.config
    return Context(
        config=config,
        run_dir=run_dir,
        device=checked.placed.device,
        dtype=checked.placed.dtype,
        tokenizer=checked.tokenizer,
        rows=checked.rows,
        events=events,
        fleet=start_fleet(keep=6 + config.kept_versions, run=config.name),
        storage=storage,
        probe=make_probe(config, checked),
        model_path=config.model.path or "",
    )


async def fill_fleet(context: Context, *, train: bool, beside: Callable[[], None] = lambda: None) -> None:
    """Start generators, rewards and what the methods need to `train`, and wait until they are loaded.

    Args:
        beside: called while they load.
    """
    config, fleet = context.config, context.fleet
    if not fleet.placed:
        place_fleet(context, context.model_path, train=train)
    beside()
    await fleet.ready()
    if fleet.reference:
        context.fingerprint = await ask(fleet.reference[0].fingerprint.remote())
    elif train and any(isinstance(p, Preference) for p in config.pipelines):
        context.frozen = await frozen_base(context)
        context.fingerprint = context.frozen.fingerprint
    spec = generator_spec(context, context.model_path, train=train)
    capacity = 1 if config.deterministic else spec.in_flight  # then a batch is admitted alone
    context.pool = Pool(fleet.generators, capacity=capacity, batch=spec.batch)
    context.beside.append(asyncio.create_task(autoscale(context)))


def place_early(context: Context, model_path: str) -> None:
    """While `sft` trains on GPUs: start the fleet's processes where there is room for them too, and all that needs no
    π0. On CPUs that would take the learner's: on two, sft lost more by it than the fleet won.

    What they need of π0 they read when `fill_fleet` has them do so, or whenever Ray starts them anew after that.
    """
    if context.device == "cpu":
        return
    short = [name for name, amount in beside_sft(context.config).items() if amount > free().get(name, 0)]
    if short:
        context.events.say(f"the fleet starts when sft has ended: there is no {short[0]} for both at once")
        return
    place_fleet(context, model_path, train=True)
    context.fleet.warm()


def place_fleet(context: Context, model_path: str, *, train: bool) -> None:
    """Start the processes of generators, rewards and what the methods need to `train`. Returns at once.

    Args:
        model_path: π0's directory, which need not be there yet.
    """
    config, fleet = context.config, context.fleet
    choice = resolve_engine(config.fleet.engine)
    spec = generator_spec(context, model_path, train=train)
    context.events.say(f"engine: {choice} (fleet.engine: {config.fleet.engine}), {context.dtype} on {context.device}")
    fleet.add_generators(
        config.fleet.generator,
        choice,
        spec,
        context.probe,
        context.tolerance,
        keep=config.kept_versions,
        pinned=config.serve.pinned if spec.seats else 0,
        run_dir=context.run_dir,
    )
    for key, reward in config.rewards.items():
        role = "scorer" if key.startswith("reward") else "judge"
        fleet.rewards[key] = add_reward(fleet, context, reward, role)
    if train and any(isinstance(p, Preference) for p in config.pipelines):
        add_reference(context, model_path)
    if train and config.embedder and any(p.embeds for p in config.methods):
        one = config.embedder
        device = "cuda" if planned(one.gpus) else "cpu"
        fleet.add_embedders(one, EmbedderSpec(path=one.path, device=device, batch_size=one.batch_size))
    if train:
        fleet.trainer()  # loads meanwhile


def generator_spec(context: Context, model_path: str, *, train: bool) -> EngineSpec:
    """What the run's generators are started with."""
    config = context.config
    users = config.serve.enabled and train and config.serve.placement == "pool"
    return engine_spec(
        config,
        model_path,
        context.dtype,
        context.device,
        versions=config.kept_versions * max(1, len(config.served)) + (config.serve.pinned if users else 0),
        seats=config.serve.seats if users else 0,
        chat_template=context.tokenizer.get_chat_template(),
    )


def add_reference(context: Context, model_path: str) -> None:
    """Copies of the frozen π0, where the learners do not answer for it."""
    settings = context.config.fleet.reference
    if count := reference_replicas(context.config):
        spec = ReferenceSpec(
            model_path=model_path,
            dtype=context.dtype,
            device="cuda" if planned(settings.gpus) else "cpu",
            threads=planned(settings.cpus),
            batch_tokens=settings.batch_tokens,
            cache=value_cache(context),
            quantize=context.config.reference_quantize,
        )
        context.fleet.add_reference(settings, spec, count)


async def frozen_base(context: Context) -> FrozenSpec:
    """What learners need to answer for the frozen π0, which is there by now."""
    fingerprint = await asyncio.to_thread(model_fingerprint, context.model_path, context.config.reference_quantize)
    return FrozenSpec(
        model_path=context.model_path, fingerprint=fingerprint, dtype=context.dtype, cache=value_cache(context)
    )


def value_cache(context: Context) -> str:
    """The directory of the caches of π0's log-probs and of services' scores. What other runs computed of the same texts
    in other batches differs in the last digit: a deterministic run reads its own alone."""
    if context.config.deterministic:
        return str(context.run_dir / "cache")
    return str(context.config.fleet.reference.cache or user_cache())


def add_reward(fleet: Fleet, context: Context, reward: SingleReward, role: str) -> list[Any]:
    """The scorers of one reward."""
    if isinstance(reward, ClassifierReward):
        spec = ScorerSpec(
            path=model_path(reward.path),
            reads=reward.reads,
            max_len=planned(reward.max_len),
            batch_tokens=reward.batch_tokens,
            device="cuda" if planned(context.config.fleet.scorer.gpus) else "cpu",
        )
    elif isinstance(reward, ServiceReward):
        spec = ScorerSpec(service=reward, cache=value_cache(context))
    else:
        spec = ScorerSpec(function=reward.function)
    return fleet.add_scorers(context.config.fleet.scorer, spec, role)


PROBE_GROUPS = {"float32": 16, "bfloat16": 64}
"""Prompts of the probe that versions are proved on, one response each: more where each says less for noise."""


def make_probe(config: Config, checked: Checked) -> tuple[TokenGroup, ...]:
    """Prompts with their targets, or with their own words where there are none: text the policy's changes show on."""
    groups: list[TokenGroup] = []
    longest = planned(config.model.max_len)
    count = PROBE_GROUPS[checked.placed.dtype]
    for prompt in checked.rows.prompts[: 4 * count]:
        ids = render(checked.tokenizer, prompt.messages)[: longest // 2]
        text = prompt.target or prompt.query
        response = encode_response(checked.tokenizer, text)[: longest // 4]
        if len(groups) < count and response:
            groups.append(TokenGroup(ids, [response]))
    return tuple(groups)
