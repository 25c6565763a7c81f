"""A run from a config to its last line: what the command line calls, and the only place that starts and stops Ray.

check -> run directory -> Ray -> π0 (`sft`) -> fleet -> pipelines -> evaluation -> teardown
"""

import asyncio
import math
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.cluster import missing, start_ray, stop_ray
from actors.engines.check import check_engine
from pipelines.context import Context, Event, EventLog
from pipelines.dlma import DlmaMethod
from pipelines.evaluate import Answers, answers_by_name, heldout_prompts, write_comparison
from pipelines.fleet import fill_fleet, make_context, place_early
from pipelines.gate import Gatekeeper
from pipelines.loop import first_failure, run_method
from pipelines.monitor import monitor_pool, push_events
from pipelines.ple import PleMethod
from pipelines.raft import RaftMethod
from pipelines.reward import run_reward
from pipelines.self_contrast import SelfContrastMethod
from pipelines.sft import run_sft
from plumbline.config.demand import demand, named
from plumbline.config.file import load_config as read_config
from plumbline.config.pipelines import Pipeline, RewardModel, Sft
from plumbline.config.tree import Config
from plumbline.data.tokenizer import run_tokenizer
from plumbline.doctor import Checked, check, check_fits
from plumbline.errors import ConfigError, PlumblineError, RunError, UserError
from plumbline.placement.lengths import settle_lengths
from plumbline.placement.machine import Machine, this_machine
from plumbline.placement.start import place
from plumbline.placement.table import line
from plumbline.records import PolicyRef, Prompt, public_name
from plumbline.runs.base import with_base
from plumbline.runs.digests import keep_digests
from plumbline.runs.directory import open_run_dir
from plumbline.runs.disk import writing
from plumbline.runs.endpoint import RunEndpoint
from plumbline.runs.gguf import made_from
from plumbline.runs.hub import fetched, named_model
from plumbline.runs.mirror import open_storage, pull_versions, push_logs, pushed_at_end, run_storage
from plumbline.runs.models import check_causal
from plumbline.runs.origin import keep_origin
from plumbline.runs.policies import base_directory, parse_ref, read_publication, versions, write_probe
from plumbline.runs.rows import heldout_fit, left_out
from plumbline.runs.storage import Storage
from plumbline.submitted import is_job
from plumbline.tracking.feed import start_trackers

METHODS = {"ple": PleMethod, "dlma": DlmaMethod, "self_contrast": SelfContrastMethod, "raft": RaftMethod}
"""What makes the parts of each type of pipeline that generates."""


def run(
    run_dir: Path, listen: Callable[[Event], None], checked: Checked, endpoint: RunEndpoint | None
) -> dict[str, Any]:
    """Run all pipelines of a checked config; continues what `run_dir` holds of it. Returns the evaluation, or nothing.

    Args:
        checked: what `plumbline.doctor.check` returned.
        endpoint: answers users meanwhile, where the config has `serve.enabled`.

    Raises:
        UserError: before anything is written, where the config cannot be run.
        RunError: the run ended early; what `run_dir` holds is whole, and the same call continues it.
    """
    config = checked.config
    with ExitStack() as ending:
        ending.enter_context(open_run_dir(config, run_dir))
        storage = open_storage(config, run_dir)
        made = made_from(checked.placed.plan.config.model.path or "")
        storage.push(keep_digests(run_dir, checked.digests), keep_origin(run_dir, made))
        ending.enter_context(pushed_at_end(storage, run_dir, lambda message: listen({"message": message})))
        trackers = ending.enter_context(start_trackers(config, run_dir, listen))
        events = EventLog(run_dir / "events.jsonl", listen, trackers)
        # The run directory keeps what the user gave: another machine places a resumed run anew, and has another cache.
        placed = with_base(checked.placed.plan.config, run_dir, storage, events.say)
        checked = replace(checked, placed=replace(checked.placed, plan=replace(checked.placed.plan, config=placed)))
        with writing(run_dir):
            return asyncio.run(within_ray(placed, lambda: run_pipelines(run_dir, checked, storage, events, endpoint)))


def compare(
    run_dir: Path,
    candidates: list[str],
    prompts: int | None,
    listen: Callable[[Event], None],
    look: Callable[[], Machine] = this_machine,
) -> dict[str, Any]:
    """Evaluate versions of a run (`base`, `ple`, `ple@12`) or models, by directory or hub name, against each other.

    Args:
        look: says what there is to place processes on.
    """
    config = read_config(run_dir / "config.yaml")
    settings = config.evaluation
    if settings is None:
        raise ConfigError(f"{run_dir}/config.yaml: to evaluate, it needs `evaluation` and `data.heldout`")
    if not config.methods:
        raise ConfigError(
            f"{run_dir}/config.yaml: to evaluate, it needs a pipeline that generates, such as `type: ple`"
        )
    if prompts is not None and prompts < 1:
        raise ConfigError(f"--prompts {prompts}: it should be 1 or more")
    named = {name: _candidate(run_dir, name) for name in candidates}
    others = [one for one in named.values() if isinstance(one, str)]
    for directory in others:
        check_causal(directory, "--of")
    checked = check(config, run_dir, check_engine, look, "evaluation")
    storage = run_storage(config, run_dir)
    config = fetched(checked.config)
    for directory in others:
        other = settle_lengths(of_directory(config, directory))
        heldout_fit(other, run_tokenizer(other), checked.rows.heldout)
    if prompts is not None:
        settings = settings.model_copy(update={"prompts": prompts})
    config = config.model_copy(update={"evaluation": settings})
    events = EventLog(run_dir / "events.jsonl", listen)
    work = partial(compare_policies, config, run_dir, checked, storage, events, named)
    with writing(run_dir):
        result = asyncio.run(within_ray(checked.placed.plan.config, work))
    push_logs(storage, run_dir)
    return result


def _candidate(run_dir: Path, name: str) -> PolicyRef | str:
    """A version of the run, or a model's directory."""
    directory = named_model(name, "--of")
    return directory if Path(directory).is_dir() else parse_ref(run_dir, name)


async def within_ray(config: Config, work: Callable[[], Any]) -> dict[str, Any]:
    """Start Ray, do the work, stop Ray: also when interrupted or terminated, which end alike.

    Raises:
        UserError: the Ray that is named cannot be joined.
        RunError: in place of a UserError too, once work has begun: exit code 2 would say that nothing was started.
    """
    task = asyncio.current_task()
    assert task is not None
    start_ray(math.ceil(demand(config, most=True)["CPU"]), named(config), run=config.name)
    # After Ray has started: it has a handler of its own, which would end this process at once.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await work()
    except UserError as error:
        raise RunError(str(error)) from error
    except BaseException:
        if task.cancelling():  # whatever a stage made of being cancelled, the user interrupted the run
            raise KeyboardInterrupt from None
        raise
    finally:
        stop_ray()


async def run_pipelines(
    run_dir: Path, checked: Checked, storage: Storage, events: EventLog, endpoint: RunEndpoint | None
) -> dict[str, Any]:
    """π0, then all pipelines at once over one fleet, then before against after.

    A pipeline that fails ends with its own error, the others go on.

    Raises:
        PlumblineError: the failure of the only pipeline, or a RunError that names those that failed.
    """
    context = make_context(run_dir, checked, storage, events)
    config = context.config
    context.events.say(line(checked.placed.plan.rows))
    for bad in checked.rows.bad.values():
        if bad.errors:
            context.events.say(left_out(bad))
    for name, asked, offered in missing(demand(config)):
        context.events.say(
            f"the run asks for {asked:g} {name}, all nodes offer {offered:g}: what finds no room waits until one joins"
        )
    if is_job() and run_dir.is_relative_to(Path.cwd()) and not config.storage_path:
        context.events.say("the job's copy of the working directory holds this run, and Ray removes it; use --run-dir")
    if context.storage.url:
        context.beside.append(asyncio.create_task(push_events(context)))
    try:
        if config.sft:
            context.events.say("training π0 (sft)")
            early = partial(place_early, context) if config.methods else lambda _: None
            context.model_path = await run_sft(context, config.sft, serves=False, begun=early)
        if config.methods:
            if endpoint:
                context.events.say("starting the endpoint")
            beside = (lambda: endpoint.start(context.live_run())) if endpoint else (lambda: None)
            await fill_fleet(context, train=True, beside=beside)
            write_probe(run_dir, context.probe)
        if endpoint:
            names = ", ".join(["base", *(public_name(p.name) for p in config.served)])
            context.events.say(f"serving {names} on {await endpoint.ready()}/v1")
            context.promoter = Gatekeeper(context)
        ended = asyncio.Event()
        watching = asyncio.create_task(monitor_pool(context, ended)) if config.methods else None
        results = await asyncio.gather(*(run_one(context, p) for p in config.pipelines), return_exceptions=True)
        if context.promoter:
            await watched(context, context.promoter.finish())
        if watching:
            ended.set()
            await watched(context, watching)
        failed = {p.name: e for p, e in zip(config.pipelines, results, strict=True) if isinstance(e, BaseException)}
        for name, error in failed.items():
            report_failure(context, name, error)
        result = {}
        if config.evaluation and config.data.heldout and len(failed) < len(config.pipelines):
            result = await evaluate_newest(context)
        if failed:
            raise the_failure(config, failed)
        return result
    finally:
        if endpoint and (address := endpoint.stop()):
            context.events.say(f"the endpoint on {address}/v1 has ended")
        await context.close()


async def run_one(context: Context, section: Pipeline) -> None:
    """One pipeline, by its type."""
    if isinstance(section, Sft):
        await run_sft(context, section, serves=section.serves_adapter)
    elif isinstance(section, RewardModel):
        await run_reward(context, section)
    else:
        # Its prompts are tokenised first, which would hold up the other pipelines.
        method = await asyncio.to_thread(METHODS[section.type], context, section)
        await run_method(context, method, section)


async def watched(context: Context, watcher: Awaitable[None]) -> None:
    """Wait for what looks on beside the pipelines. That it failed is said: what they made is evaluated all the same."""
    try:
        await watcher
    except PlumblineError as error:
        context.events.say(f"what looks on beside the pipelines failed: {error}")


def report_failure(context: Context, name: str, error: BaseException) -> None:
    """A line of a failed pipeline's own, in the events and on the screen."""
    if isinstance(error, PlumblineError):
        context.events.write({"pipeline": name, "error": str(error)})
        context.events.say(f"{name} failed: {error}")


def the_failure(config: Config, failed: Mapping[str, BaseException]) -> BaseException:
    """What a run with failed pipelines raises: a bug as it is, the only pipeline's own error, or all in one line."""
    errors = {name: first_failure(error) for name, error in failed.items()}
    for error in errors.values():
        if not isinstance(error, PlumblineError) or len(config.pipelines) == 1:
            return error
    told = "; ".join(f"{name}: {error}" for name, error in errors.items())
    return RunError(f"{len(errors)} of {len(config.pipelines)} pipelines failed ({told}); the others are done")


async def evaluate_newest(context: Context) -> dict[str, Any]:
    """π0 against the newest version of every policy that generators can load; nothing where there is none."""
    await asyncio.to_thread(pull_versions, context.storage, context.run_dir)  # the learners may be elsewhere
    there = {p.name: versions(context.run_dir, p.name) for p in context.config.served}
    newest = {name: PolicyRef(policy=name, version=numbers[-1]) for name, numbers in there.items() if numbers}
    if not newest or not context.config.methods:
        return {}
    for ref in newest.values():  # an older run's version is not in this run's store
        await context.fleet.store.publish.remote(read_publication(context.run_dir, ref))
    heldout = heldout_prompts(context)
    answers = await answers_by_name(context, {"before": PolicyRef(), **newest}, heldout, PolicyRef())
    return write_comparison(context, answers, heldout)


async def compare_policies(
    config: Config,
    run_dir: Path,
    checked: Checked,
    storage: Storage,
    events: EventLog,
    named: Mapping[str, PolicyRef | str],
) -> dict[str, Any]:
    """See `compare`. Versions of the run share one pool; each model directory gets its own, one after another.

    The prompts are those of the training: what versions are proved on is made from them.
    """
    base = base_directory(config, run_dir)
    pools: dict[str, dict[str, PolicyRef]] = {}
    for name, one in named.items():
        if isinstance(one, str):
            pools.setdefault(str(Path(one).resolve()), {})[name] = PolicyRef()
        else:
            pools.setdefault(base, {})[name] = one
    answers: dict[str, Answers] = {}
    heldout: list[Prompt] = []
    result: dict[str, Any] = {}
    for directory, refs in pools.items():
        other = of_directory(config, directory)
        placed = place(other, checked.placed.machine, "evaluation")
        check_fits(placed)
        own = replace(checked, tokenizer=run_tokenizer(other), placed=placed)
        context = make_context(run_dir, own, storage, events)
        try:
            await fill_fleet(context, train=False)
            for ref in refs.values():
                if ref.version:
                    await context.fleet.store.publish.remote(read_publication(run_dir, ref))
            heldout = heldout or heldout_prompts(context)  # the same for all, whatever their tokenizers
            answers |= await answers_by_name(context, refs, heldout, PolicyRef() if directory == base else None)
            result = write_comparison(context, {n: answers[n] for n in named if n in answers}, heldout)
        finally:
            await context.close()
    return result


def of_directory(config: Config, directory: str) -> Config:
    """The config with the model of a directory in place of its own."""
    return config.model_copy(update={"model": config.model.at(str(Path(directory).resolve()))})
