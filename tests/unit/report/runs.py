"""Runs that reports are made of, written by hand, and what a browser would find on their pages."""

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from plumbline.report.page import write_report
from plumbline.runs.parts import Rejected

HOSTILE = "<script>alert(1)</script>"
BREAKOUT = '"><img src=x onerror=alert(1)>'
START = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC

CONFIG: dict[str, Any] = {
    "name": "three",
    "seed": 7,
    "model": {"path": "/models/base"},
    "data": {
        "train": {"path": "/data/train.jsonl", "note": "from a survey"},
        "heldout": {"path": "/data/heldout.jsonl"},
    },
    "fleet": {"engine": "vllm", "generator": {"replicas": 2}},
    "reward": {"type": "program", "function": "module:score"},
    "pipelines": [
        {"name": "ple", "type": "ple", "steps": 3, "tau0": 0.2, "principle": f"Be kind. {HOSTILE} {BREAKOUT}"},
        {"name": "dlma", "type": "dlma", "steps": 2, "beta": 0.1, "learner": {"lr": 1e-5, "max_failures": 3}},
        {"name": "sc", "type": "self_contrast", "steps": 4, "negatives": 8},
    ],
    "evaluation": {"prompts": 4},
}


def event(pipeline: str, step: int, after: float, **figures: Any) -> dict[str, Any]:
    steps = {"ple": 3, "dlma": 2, "sc": 4}[pipeline]
    return {"time": START + after, "pipeline": pipeline, "step": step, "steps": steps, **figures}


EVENTS: list[dict[str, Any]] = [
    event("ple", 1, 10, reward_plain=0.1, reward_guided=0.6, gap=0.5, tau=0.2, loss=-0.2, seconds=10.0),
    event("ple", 2, 20, reward_plain=None, reward_guided=0.7, gap=0.4, tau=0.18, loss=-0.3, seconds=10.0),
    event("ple", 3, 30, reward_plain=0.3, reward_guided=0.7, gap=0.4, tau=0.162, loss=None, seconds=10.0),
    event("dlma", 1, 15, margin_q10=-1.0, margin_q50=2.0, margin_q90=5.0, margin_mean=2.1, accuracy=0.5, loss=0.7),
    event("dlma", 2, 35, margin_q10=-1.0, margin_q50=3.0, margin_q90=6.0, margin_mean=2.9, accuracy=0.6, loss=0.6),
    event("sc", 1, 18, similarity_q10=0.2, similarity_q50=0.5, similarity_q90=0.8, retention=0.75, loss=0.69),
    {"time": START + 20, "pipeline": "pool", "tokens_per_s": 100.0, "utilisation": 0.9, "shares": {"ple": 1.0}},
    {
        "time": START + 25,
        "pipeline": "pool",
        "tokens_per_s": 90.0,
        "utilisation": 0.8,
        "shares": {"ple": 0.5, "sc": 0.5},
    },
    {"time": START + 40, "pipeline": "sc", "error": f"loss is nan {HOSTILE} `{BREAKOUT}`"},
]


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 4}


ROWS: list[dict[str, Any]] = [
    {"policy": "before", "prompts": 4, "reward": interval(-0.25, 0.125), "PPL": 1.5, "tokens": 20.0, "blank": 0},
    {
        "policy": "ple",
        "prompts": 4,
        "reward": interval(0.5, 0.25),
        "PPL": 1.625,
        "tokens": 22.5,
        "blank": 0,
        "win rate": 0.875,
    },
    {"policy": f"dlma {HOSTILE}", "prompts": 4, "reward": None, "PPL": 1.75, "tokens": 21.0, "blank": 1},
]
SAMPLES = [
    {"prompt": HOSTILE, "before": BREAKOUT, "ple": "A <b>kind</b> answer & more.", "dlma": "  \n"},
    {"prompt": "Second?", "before": "No.", "ple": "Yes.", "dlma": None},
]


def make_run(
    directory: Path,
    config: Mapping[str, Any] = CONFIG,
    events: Sequence[Mapping[str, Any]] | None = EVENTS,
    evaluation: Mapping[str, Any] | None = None,
) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if events is not None:
        (directory / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    if evaluation is not None:
        (directory / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return directory


def whole_run(path: Path) -> Path:
    directory = make_run(path, evaluation={"rows": ROWS, "samples": SAMPLES})
    reject(directory / "rollouts" / "ple", {"blank answer": 1, "identical answers": 2})
    reject(directory / "pairs" / "dlma", {"identical answers": 3, HOSTILE: 1})
    return directory


def reject(directory: Path, counts: Mapping[str, int]) -> None:
    rows = [
        {"prompt_id": f"{reason} {i}", "prompt": "?", "reason": reason, "detail": ""}
        for reason, count in counts.items()
        for i in range(count)
    ]
    Rejected(str(directory / "rejected.parquet")).add(1, rows)


class Page(HTMLParser):
    """What a browser would find: tags, ids, attributes, and the texts of table rows, headings and notices."""

    VOID = frozenset({"meta", "rect", "line", "path", "use", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.headings: list[str] = []
        self.notices: list[str] = []
        self.paragraphs: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag in self.VOID and tag != "path":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.in_best = ("class", "best") in attrs
        elif tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")
        elif tag == "li":
            self.notices.append("")
        elif tag == "p":
            self.paragraphs.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
            if "td" in self.open and self.in_best and "small" not in self.open:
                self.best.append(data)
        for tags, texts in (
            ({"h1", "h2", "h3", "h4"}, self.headings),
            ({"li"}, self.notices),
            ({"p"}, self.paragraphs),
        ):
            if tags & set(self.open):
                texts[-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)[1:]

    def has_notice(self, text: str) -> bool:
        return any(text in notice for notice in self.notices)


def report(run_dir: Path) -> Page:
    return Page(write_report(run_dir))
