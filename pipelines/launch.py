"""A run from a config to its last line: what the command line calls, and the only place that starts and stops Ray.

check -> run directory -> Ray -> π0 (`sft`) -> fleet -> pipelines -> evaluation -> teardown
"""

import asyncio
import json
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.engine import EngineSpec, resolve_engine
from actors.scorer import ScorerSpec
from actors.spawn import Fleet, start_fleet, start_ray, stop_ray
from actors.weights import TOLERANCE
from pipelines.context import Context, Event, EventLog
from pipelines.evaluate import Answers, answers_of, summarize
from pipelines.loop import first_failure
from pipelines.ple import run_ple
from pipelines.reward import run_reward
from pipelines.sft import run_sft
from plumbline.config import ClassifierReward, Config, Ple, Reward, RewardModel, Sft
from plumbline.config_file import load_config as read_config
from plumbline.dataset import read_prompts
from plumbline.doctor import check, model_directory, resolve_device, resolve_dtype, run_tokenizer
from plumbline.errors import ConfigError
from plumbline.lengths import prompt_lengths
from plumbline.policies import model_path, parse_ref, read_publication, version_directory, versions
from plumbline.prompting import encode_response, render
from plumbline.records import PolicyRef, Prompt, TokenGroup
from plumbline.run_dir import open_run_dir

PROBE_GROUPS = 16
"""Prompts of the probe that versions are proved on, one response each."""


def run(
    config: Config, run_dir: Path, listen: Callable[[Event], None], prompts: list[Prompt] | None = None
) -> dict[str, Any]:
    """Run all pipelines of a config; continues what `run_dir` holds of it. Returns the evaluation, or nothing.

    Args:
        prompts: what `plumbline.doctor.check` returned, where the caller has called it; else it is called here.

    Raises:
        UserError: before anything is written, where the config cannot be run.
        RunError: the run ended early; what `run_dir` holds is whole, and the same call continues it.
    """
    checked = check(config, run_dir) if prompts is None else prompts
    open_run_dir(config, run_dir)
    return asyncio.run(within_ray(config, lambda: run_pipelines(config, run_dir, checked, listen)))


def compare(
    run_dir: Path, candidates: list[str], prompts: int | None, listen: Callable[[Event], None]
) -> dict[str, Any]:
    """Evaluate versions of a run (`base`, `ple`, `ple@12`) or model directories against each other."""
    config = read_config(run_dir / "config.yaml")
    settings = config.evaluation
    if settings is None or config.data.heldout is None:
        raise ConfigError(f"{run_dir}/config.yaml: to evaluate, it needs `evaluation` and `data.heldout`")
    if not any(isinstance(p, Ple) for p in config.pipelines):
        raise ConfigError(f"{run_dir}/config.yaml: to evaluate, it needs a pipeline of `type: ple`")
    if prompts is not None and prompts < 1:
        raise ConfigError(f"--prompts {prompts}: it should be 1 or more")
    named = {name: None if Path(name).is_dir() else parse_ref(run_dir, name) for name in candidates}
    for name, ref in named.items():
        if ref is None:
            model_directory(name, "--of")
    checked = check(config, run_dir)
    if prompts is not None:
        settings = settings.model_copy(update={"prompts": prompts})
    config = config.model_copy(update={"evaluation": settings})
    return asyncio.run(within_ray(config, lambda: compare_policies(config, run_dir, checked, named, listen)))


async def within_ray(config: Config, work: Callable[[], Any]) -> dict[str, Any]:
    """Start Ray, do the work, stop Ray: also when interrupted or terminated, which end alike."""
    task = asyncio.current_task()
    assert task is not None
    fleet = config.fleet
    learners = [p.learner for p in config.pipelines] + ([config.sft.learner] if config.sft else [])
    start_ray(
        fleet.generator.replicas * fleet.generator.cpus
        + max(learner.workers * learner.cpus for learner in learners)
        + int(fleet.scorer.replicas * fleet.scorer.cpus)
    )
    # After Ray has started: it has a handler of its own, which would end this process at once.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await work()
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        stop_ray()


async def run_pipelines(
    config: Config, run_dir: Path, prompts: list[Prompt], listen: Callable[[Event], None]
) -> dict[str, Any]:
    """π0, then all pipelines at once over one fleet, then before against after."""
    context = make_context(config, run_dir, prompts, listen)
    try:
        if config.sft:
            context.events.say("training π0 (sft)")
            context.model_path = await run_sft(context, config.sft)
        rolling = [p for p in config.pipelines if isinstance(p, Ple)]
        if rolling:
            await fill_fleet(context, rolling)
        async with asyncio.TaskGroup() as pipelines:
            for section in config.pipelines:
                pipelines.create_task(run_one(context, section))
        if config.evaluation and config.data.heldout and rolling:
            newest = {p.name: PolicyRef(policy=p.name, version=versions(run_dir, p.name)[-1]) for p in rolling}
            heldout = heldout_prompts(context)
            answers = await answers_by_name(context, {"before": PolicyRef(), **newest}, heldout)
            return write_comparison(run_dir, answers, heldout, config)
        return {}
    except BaseExceptionGroup as group:
        raise first_failure(group) from None
    finally:
        context.fleet.close()


async def run_one(context: Context, section: Ple | Sft | RewardModel) -> None:
    """One pipeline, by its type."""
    if isinstance(section, Ple):
        await run_ple(context, section)
    elif isinstance(section, Sft):
        await run_sft(context, section)
    else:
        await run_reward(context, section)


async def compare_policies(
    config: Config,
    run_dir: Path,
    prompts: list[Prompt],
    named: Mapping[str, PolicyRef | None],
    listen: Callable[[Event], None],
) -> dict[str, Any]:
    """See `compare`. Versions of the run share one pool; each model directory gets its own, one after another.

    The prompts are those of the training: what versions are proved on is made from them.
    """
    base = base_directory(config, run_dir)
    pools: dict[str, dict[str, PolicyRef]] = {}
    for name, ref in named.items():
        pools.setdefault(base if ref else str(Path(name).resolve()), {})[name] = ref or PolicyRef()
    answers: dict[str, Answers] = {}
    heldout: list[Prompt] = []
    for directory, refs in pools.items():
        model = config.model.model_copy(update={"path": directory, "init": None, "tokenizer": None})
        context = make_context(config.model_copy(update={"model": model}), run_dir, prompts, listen)
        try:
            await fill_fleet(context, [p for p in config.pipelines if isinstance(p, Ple)])
            for ref in refs.values():
                if ref.version:
                    await context.fleet.store.publish.remote(read_publication(run_dir, ref))
            heldout = heldout or heldout_prompts(context)  # the same for all, whatever their tokenizers
            answers |= await answers_by_name(context, refs, heldout)
        finally:
            context.fleet.close()
    return write_comparison(run_dir, {name: answers[name] for name in named}, heldout, config)


def base_directory(config: Config, run_dir: Path) -> str:
    """Where a run's π0 lies."""
    if config.sft:
        return str(version_directory(run_dir, parse_ref(run_dir, config.sft.name)))
    assert config.model.path is not None
    return config.model.path


def make_context(config: Config, run_dir: Path, prompts: list[Prompt], listen: Callable[[Event], None]) -> Context:
    """What all pipelines share, with an empty fleet."""
    device = resolve_device(config.fleet.device)
    context = Context(
        config=config,
        run_dir=run_dir,
        device=device,
        dtype=resolve_dtype(config.model.dtype, device),
        tokenizer=run_tokenizer(config),
        prompts=prompts,
        events=EventLog(run_dir / "events.jsonl", listen),
        fleet=start_fleet(keep=8 + max((p.max_staleness for p in config.pipelines if isinstance(p, Ple)), default=0)),
        model_path=config.model.path or "",
    )
    return replace(context, probe=make_probe(context))


async def fill_fleet(context: Context, pipelines: list[Ple]) -> None:
    """Start generators and rewards, and wait until they are loaded."""
    config, fleet = context.config, context.fleet
    choice = resolve_engine(config.fleet.engine)
    settings = config.fleet.generator
    in_flight = sum(p.max_staleness + 2 for p in pipelines)
    spec = EngineSpec(
        model_path=context.model_path,
        dtype=context.dtype,
        device=context.device,
        max_model_len=config.model.max_len,
        max_num_seqs=settings.max_num_seqs,
        max_lora_rank=max(p.policy.r for p in pipelines),
        max_adapters=in_flight,
        threads=settings.cpus,
        kv_cache_gib=settings.kv_cache_gib,
        memory_share=settings.memory_share,
        seed=config.seed,
    )
    context.events.say(f"engine: {choice} (fleet.engine: {config.fleet.engine}), {context.dtype} on {context.device}")
    tolerance = config.fleet.sync_tolerance or TOLERANCE[context.dtype]
    fleet.add_generators(
        settings, choice, spec, context.probe, tolerance, keep=max(p.max_staleness for p in pipelines) + 2
    )
    if config.reward:
        fleet.scorer = add_reward(fleet, context, config.reward)
    if config.evaluation and config.evaluation.judge:
        fleet.judge = add_reward(fleet, context, config.evaluation.judge)
    await fleet.ready()


def add_reward(fleet: Fleet, context: Context, reward: Reward) -> list[Any]:
    """The scorers of one reward."""
    if isinstance(reward, ClassifierReward):
        spec = ScorerSpec(
            path=model_path(reward.path),
            reads=reward.reads,
            max_len=reward.max_len,
            batch_tokens=reward.batch_tokens,
            device="cuda" if context.config.fleet.scorer.gpus else "cpu",
        )
    else:
        spec = ScorerSpec(function=reward.function)
    return fleet.add_scorers(context.config.fleet.scorer, spec)


async def answers_by_name(
    context: Context, candidates: Mapping[str, PolicyRef], prompts: list[Prompt]
) -> dict[str, Answers]:
    """Every candidate's answers to the held-out prompts, sampled as the config says."""
    settings = context.config.evaluation
    ple = next(p for p in context.config.pipelines if isinstance(p, Ple))
    assert settings is not None
    answers = {}
    for name, ref in candidates.items():
        context.events.say(f"evaluating {name} on {len(prompts)} held-out prompts")
        answers[name] = await answers_of(context, ref, prompts, settings.generation or ple.generation, ple.principle)
    return answers


def heldout_prompts(context: Context) -> list[Prompt]:
    """Held-out prompts within the limits, in an order of the run's seed."""
    config, settings = context.config, context.config.evaluation
    assert settings is not None and config.data.heldout is not None
    ple = next(p for p in config.pipelines if isinstance(p, Ple))
    source = config.data.heldout
    prompts = read_prompts(source.path, columns=source.columns, split=source.split, limit=source.limit)
    principle, tokens = ple.principle, ple.generation.max_tokens
    fitting = [p for p in prompts if prompt_lengths(config, context.tokenizer, p, principle, tokens).fit]
    random.Random(config.seed).shuffle(fitting)
    return fitting[: settings.prompts]


def write_comparison(
    run_dir: Path, answers: Mapping[str, Answers], prompts: list[Prompt], config: Config
) -> dict[str, Any]:
    """`evaluation.json`, and what the command line shows."""
    assert config.evaluation is not None
    result = summarize(answers, prompts, config.evaluation.samples)
    (run_dir / "evaluation.json").write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    return result


def make_probe(context: Context) -> tuple[TokenGroup, ...]:
    """Prompts with their targets, or with their own words where there are none: text the policy's changes show on."""
    groups = []
    for prompt in context.prompts[: 4 * PROBE_GROUPS]:
        ids = render(context.tokenizer, prompt.messages)[: context.config.model.max_len // 2]
        text = prompt.target or prompt.query
        response = encode_response(context.tokenizer, text)[: context.config.model.max_len // 4]
        if len(groups) < PROBE_GROUPS and response:
            groups.append(TokenGroup(ids, [response]))
    return tuple(groups)
