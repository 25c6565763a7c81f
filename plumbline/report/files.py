"""The files of a run's directory that its report is made of, read and checked.

Called by `plumbline.report.page`. What a figure has to be is told here once, so that tables and plots need not ask.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from plumbline.errors import ConfigError, DataError, UserError
from plumbline.report.kinds import FIGURES, is_part

Event = dict[str, Any]

OTHERS = ("time", "step", "steps", "seconds", "heldout_accuracy", "heldout")
"""Numbers of an event that are told rather than drawn."""
YEAR_9999 = 253_000_000_000


def check_run(run_dir: Path) -> None:
    """Raises UserError where there is no such directory, or it holds no run."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such directory; name a run's, such as runs/quickstart")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: no run directory: there is no config.yaml in it")


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """What ran, as a tree and as text. Not checked as a config to run is: a run of another version has a report too.

    Raises:
        ConfigError: it is no YAML mapping with a list of pipelines.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.setdefault("pipelines", []), list):
        raise ConfigError(f"{path}: no config of a run; it should be a mapping with a list of `pipelines`")
    for key, section in [
        ("sft", tree.get("sft") or {}),
        *((f"pipelines.{i}", p) for i, p in enumerate(tree["pipelines"])),
    ]:
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: {key}: should be a mapping of keys, got {section!r}")
    return tree, text


def read_events(path: Path) -> tuple[list[Event], bool]:
    """The lines of `events.jsonl`, and whether the last one was half-written, which is left out.

    Raises:
        DataError: another line is broken, or a figure is no number; it names the file and the row.
    """
    if not path.exists():
        return [], False
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    events = []
    for row, line in enumerate(lines, start=1):
        try:
            event = json.loads(line, parse_constant=lambda _: None)  # NaN is no JSON, and nothing to draw
        except ValueError as error:
            if row == len(lines):
                return events, True
            raise DataError(f"{path}, row {row}: no JSON ({error}); remove the line") from None
        if not isinstance(event, dict) or not isinstance(event.get("pipeline"), str):
            raise DataError(f"{path}, row {row}: should be a JSON object with the name of its `pipeline`")
        shares = event.get("shares") or {}
        if not isinstance(shares, dict):
            raise DataError(f"{path}, row {row}: `shares` is {shares!r}; it should map pipelines to numbers")
        figures = {key: event.get(key) for key in (*OTHERS, *sorted(FIGURES), *filter(is_part, event))}
        for key, value in {**figures, **{f"shares.{name}": share for name, share in shares.items()}}.items():
            if value is not None and not isinstance(value, int | float):
                raise DataError(f"{path}, row {row}: `{key}` is {value!r}; it should be a number or null")
        if not 0 <= (event.get("time") or 0) < YEAR_9999:
            raise DataError(f"{path}, row {row}: `time` is {event['time']!r}; it should be seconds since 1970")
        events.append(event)
    return events, False


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """`evaluation.json`, or None where the run has not come to it. Raises DataError."""
    if not path.exists():
        return None
    remedy = "make it anew by `plumbline evaluate`"
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}); {remedy}") from None
    for key, needed in (("rows", "policy"), ("samples", "prompt")):
        items = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) and needed in item for item in items):
            raise DataError(f"{path}: `{key}` should be a list of objects with `{needed}`; {remedy}")
    prompts, rewards = tree.setdefault("prompts", []), tree.setdefault("rewards", {})
    if not isinstance(prompts, list) or not all(isinstance(key, str) for key in prompts):
        raise DataError(f"{path}: `prompts` should be a list of texts; {remedy}")
    if not isinstance(rewards, dict):
        raise DataError(f"{path}: `rewards` should map policies to a number or null for each prompt; {remedy}")
    for who, values in rewards.items():
        numbers = isinstance(values, list) and all(one is None or isinstance(one, int | float) for one in values)
        if not numbers or (prompts and len(values) != len(prompts)):
            raise DataError(f"{path}: `rewards` of {who!r} should be a number or null for each prompt; {remedy}")
    return tree
