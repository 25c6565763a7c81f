"""What the pipelines of a run share, made from its config: the context, and the fleet of actors in it.

`pipelines.run` calls it before they start, and again for each model that `plumbline evaluate` compares.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.embedder import EmbedderSpec
from actors.engines.seam import engine_spec
from actors.engines.start import resolve_engine
from actors.reference import ReferenceSpec
from actors.scorer import ScorerSpec
from actors.spawn import Fleet, ask, start_fleet
from pipelines.autoscaler import autoscale
from pipelines.context import Context, EventLog
from pipelines.pool import Pool
from plumbline.config.data import ClassifierReward, Reward
from plumbline.config.pipelines import Preference
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.data.prompting import encode_response, render
from plumbline.doctor import Checked
from plumbline.records import TokenGroup
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
        prompts=checked.prompts,
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
    choice = resolve_engine(config.fleet.engine)
    settings = config.fleet.generator
    users = config.serve.enabled and train and config.serve.placement == "pool"
    spec = engine_spec(
        config,
        context.model_path,
        context.dtype,
        context.device,
        versions=config.kept_versions * max(1, len(config.served)) + (config.serve.pinned if users else 0),
        seats=config.serve.seats if users else 0,
        chat_template=context.tokenizer.chat_template,
    )
    context.events.say(f"engine: {choice} (fleet.engine: {config.fleet.engine}), {context.dtype} on {context.device}")
    fleet.add_generators(
        settings,
        choice,
        spec,
        context.probe,
        context.tolerance,
        keep=config.kept_versions,
        pinned=config.serve.pinned if users else 0,
        run_dir=context.run_dir,
    )
    if config.reward:
        fleet.scorer = add_reward(fleet, context, config.reward)
    if config.evaluation and config.evaluation.judge:
        fleet.judge = add_reward(fleet, context, config.evaluation.judge, role="judge")
    if train and any(isinstance(p, Preference) for p in config.pipelines):
        add_reference(context)
    if train and config.embedder and any(p.embeds for p in config.methods):
        one = config.embedder
        device = "cuda" if planned(one.gpus) else "cpu"
        fleet.add_embedders(one, EmbedderSpec(path=one.path, device=device, batch_size=one.batch_size))
    if train:
        fleet.trainer()  # loads meanwhile
    beside()
    await fleet.ready()
    if fleet.reference:
        context.fingerprint = await ask(fleet.reference[0].fingerprint.remote())
    longest = max(p.generation.max_tokens for p in config.methods)
    context.pool = Pool(fleet.generators, capacity=spec.in_flight * longest, batch=spec.batch)
    context.beside.append(asyncio.create_task(autoscale(context)))


def add_reference(context: Context) -> None:
    """The frozen π0, with its cache."""
    settings = context.config.fleet.reference
    cache = Path(settings.cache) if settings.cache else user_cache()
    context.fleet.add_reference(
        settings,
        ReferenceSpec(
            model_path=context.model_path,
            dtype=context.dtype,
            device="cuda" if planned(settings.gpus) else "cpu",
            threads=planned(settings.cpus),
            batch_tokens=settings.batch_tokens,
            cache=str(cache),
        ),
    )


def user_cache() -> Path:
    """Where a user's programs keep what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plumbline"


def add_reward(fleet: Fleet, context: Context, reward: Reward, role: str = "scorer") -> list[Any]:
    """The scorers of one reward."""
    if isinstance(reward, ClassifierReward):
        spec = ScorerSpec(
            path=model_path(reward.path),
            reads=reward.reads,
            max_len=reward.max_len,
            batch_tokens=reward.batch_tokens,
            device="cuda" if planned(context.config.fleet.scorer.gpus) else "cpu",
        )
    else:
        spec = ScorerSpec(function=reward.function)
    return fleet.add_scorers(context.config.fleet.scorer, spec, role)


PROBE_GROUPS = 16
"""Prompts of the probe that versions are proved on, one response each."""


def make_probe(config: Config, checked: Checked) -> tuple[TokenGroup, ...]:
    """Prompts with their targets, or with their own words where there are none: text the policy's changes show on."""
    groups = []
    for prompt in checked.prompts[: 4 * PROBE_GROUPS]:
        ids = render(checked.tokenizer, prompt.messages)[: config.model.max_len // 2]
        text = prompt.target or prompt.query
        response = encode_response(checked.tokenizer, text)[: config.model.max_len // 4]
        if len(groups) < PROBE_GROUPS and response:
            groups.append(TokenGroup(ids, [response]))
    return tuple(groups)
