"""From a model and a data file to a config that runs: what `plumbline init` writes, and why.

It reads every row as a run would, and proposes a method by what the rows have, limits by their lengths, and a size by
the machine. Each choice stands in the config with its reason, to be changed there.
"""

import importlib.util
import json
import keyword
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from plumbline.config.reading import Reading
from plumbline.data.bad_rows import BadRows
from plumbline.data.dataset import as_lines, read_preferences, read_prompts
from plumbline.data.ending import encode_responses
from plumbline.data.prompting import principle_text, render_all
from plumbline.data.readers import read_rows
from plumbline.data.row import nearest
from plumbline.data.tokenizer import load_tokenizer, read_tokenizer
from plumbline.errors import ModelError, UserError
from plumbline.models.files import model_files
from plumbline.models.positions import positions, read_config
from plumbline.placement.machine import Machine
from plumbline.records import Prompt
from plumbline.runs.hub import named_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Method = Literal["ple", "dlma", "self_contrast", "dpo", "sft"]
MEASURED = 2000
"""Rows whose tokens are counted, drawn at random."""
LOOKED_AT = 100
"""Rows that say which columns there are."""
HELD_BACK, MOST_HELD_BACK, LEAST_TO_SPLIT = 0.1, 256, 20
"""The share of rows that no training sees, how many at most, and of how many rows some can be spared."""
_RATES = ((5e7, "1.0e-3"), (1e9, "5.0e-4"), (math.inf, "2.0e-4"))
"""Learning rates of an adapter, for models of so many weights at most."""
BAD_ALLOWED = 0.05
"""The share of rows that may be left out, as `data.max_bad_rows` has it."""
_OPTIONS: Mapping[str, tuple[tuple[Method, ...], str]] = {
    "heldout": (("ple", "dlma", "self_contrast", "dpo"), "all other methods do: give one of them as --method"),
    "quality": (("ple", "dlma"), "ple and dlma do: give --method dlma"),
    "embedder": (("self_contrast",), "self_contrast does, with a target in every row: give --method self_contrast"),
}
"""Options that some methods alone read: which do, and what to do where another is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user said. `quality` is what answers should become, in a sentence."""

    model: str
    data: str
    heldout: str | None = None
    method: Method | None = None
    quality: str | None = None
    reward: bool = False
    embedder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the data is: its rows, how they are read, and tokens of some of its prompts and answers, ascending."""

    rows: Sequence[Prompt]
    columns: Mapping[str, str]
    bad: int
    pairs: bool
    targets: int
    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Lengths in tokens, and what a step is."""

    prompt: int
    answer: int
    whole: int
    batch: int
    steps: int | None
    weights: str
    lr: str


def propose(asked: Asked, out: Path, machine: Machine) -> dict[str, str]:
    """The files to write into the directory `out`, by their names; `config.yaml` is one of them.

    Raises:
        UserError: the model or the data cannot be read, or the method asked for needs what is not there.
    """
    directory = named_model(asked.model, "--model")
    template = _template(directory)
    seen = _look(asked.data, load_tokenizer(directory, template))
    method, why = _method(asked, seen)
    _check_read(asked, method)
    if method == "ple" and asked.quality:
        principle_text(asked.quality)
    sizes = _sizes(directory, method, seen, machine)
    files = {"reward.py": _REWARD, "test_reward.py": _REWARD_TEST.format(module=_module(out))} if asked.reward else {}
    train, heldout, splits = asked.data, asked.heldout, False
    held_columns, held_bad = _check_heldout(heldout) if heldout else ({}, 0)
    if heldout is None and method != "sft" and len(seen.rows) >= LEAST_TO_SPLIT:
        train, heldout, splits = str(out / "train.jsonl"), str(out / "heldout.jsonl"), True
        learnt, kept = _split(seen.rows)
        files |= {"train.jsonl": as_lines(learnt), "heldout.jsonl": as_lines(kept)}
    page = _page().render(
        asked=asked,
        out=out,
        name=_name(out),
        template=template,
        seen=seen,
        rows=len(seen.rows),
        method=method,
        why=why,
        sizes=sizes,
        train=train,
        heldout=heldout,
        held_columns=held_columns,
        splits=splits,
        skips=(seen.bad and not splits) or held_bad,
        module=_module(out) if asked.reward else "",
        prompt_tokens={p: _percentile(seen.prompt_tokens, p) for p in (50, 95, 99, 100)},
        answer_tokens=_percentile(seen.answer_tokens, 95) if len(seen.answer_tokens) else 0,
        judged=MOST_HELD_BACK,
    )
    try:
        page.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"init: {page[error.start]!a} in an option is no whole character; write it as UTF-8") from error
    return {"config.yaml": page, **files}


def _name(out: Path) -> str:
    """A run's name, of what a config's may be made of."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", out.resolve().name).lstrip("_.-")
    return name[:64] or "run"


def _check_heldout(heldout: str) -> tuple[Mapping[str, str], int]:
    """How its columns are called, and how many rows cannot be used. Raises DataError where those are too many."""
    columns, _ = _columns(heldout)
    bad = BadRows(heldout, BAD_ALLOWED)
    bad.check(len(read_prompts(heldout, columns=columns, on_bad=bad)))
    return columns, len(bad.errors)


def _page() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("plumbline", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = lambda value: json.dumps(value, ensure_ascii=False)  # YAML reads JSON's strings
    return environment.get_template("proposal.yaml.j2")


def _template(model: str) -> str | None:
    """A chat template for a model that has none."""
    tokenizer = read_tokenizer(model)
    if tokenizer.chat_template:
        return None
    return "chatml" if "<|im_start|>" in tokenizer.get_vocab() else "plain"


def _look(data: str, tokenizer: "PreTrainedTokenizerBase") -> _Seen:
    """Raises DataError where nothing in it can be read, or too much cannot."""
    columns, pairs = _columns(data)
    bad = BadRows(data, BAD_ALLOWED)
    reading = Reading(columns=columns, on_bad=bad)
    rows = read_preferences(data, **reading) if pairs else read_prompts(data, target="read", **reading)
    bad.check(len(rows))
    some = Random(0).sample(rows, min(MEASURED, len(rows)))
    answers = [text for prompt in some if (text := prompt.chosen if pairs else prompt.target)]
    return _Seen(
        rows=rows,
        columns=columns,
        bad=len(bad.errors),
        pairs=pairs,
        targets=sum(prompt.target is not None for prompt in rows),
        prompt_tokens=_lengths(render_all(tokenizer, [(prompt.messages, None) for prompt in some])),
        answer_tokens=_lengths(encode_responses(tokenizer, answers)),
    )


def _columns(data: str) -> tuple[dict[str, str], bool]:
    """Columns whose names are not ours but mean the same, by the first rows; and whether rows are preferences."""
    values: dict[str, object] = {}
    for _, row in islice(read_rows(data, on_bad=lambda _: None), LOOKED_AT):
        values |= {name: value for name, value in row.items() if value is not None or name not in values}
    texts = [name for name, value in values.items() if isinstance(value, str | list)]
    if "chosen" in texts and "rejected" in texts:
        return {}, True
    known = ("prompt", "messages", "conversations", "instruction")
    asks = None if any(name in values for name in known) else nearest("prompt", texts)
    answers = None if {"target", "completion"} & set(texts) or asks is None else nearest("target", texts)
    found = {"prompt": asks, "target": answers if answers != asks else None}
    return {ours: theirs for ours, theirs in found.items() if theirs}, False


def _lengths(ids: Sequence[Sequence[int]]) -> np.ndarray:
    return np.sort(np.array([len(one) for one in ids], int))


def _method(asked: Asked, seen: _Seen) -> tuple[Method, str]:
    """What to learn by, and why. Raises UserError where the data does not have what was asked for."""
    whole = seen.targets == len(seen.rows)
    if asked.method is None:
        if asked.reward:
            return "ple", "there is a reward: PLE learns from it online"
        if seen.pairs:
            return "dpo", "the rows have chosen and rejected answers: DPO on them"
        if whole:
            return "self_contrast", "every row has a target: Self-Contrast learns it against the model's own answers"
        return "dlma", "prompts alone: DLMA makes its pairs by two opposite instructions, and judges them by itself"
    if asked.method == "dpo" and not seen.pairs:
        raise UserError(f"--method dpo: {asked.data} has no `chosen` and `rejected`; ple and dlma need prompts alone")
    if asked.method in ("self_contrast", "sft") and not whole:
        lacking = len(seen.rows) - seen.targets
        raise UserError(f"--method {asked.method}: {lacking} of {len(seen.rows)} rows of {asked.data} have no target")
    if asked.method == "sft" and asked.reward:
        raise UserError("--method sft: it generates nothing that --reward could score; leave that out")
    if asked.method == "ple" and not asked.reward:
        raise UserError("--method ple: it needs a reward; add --reward, and a function is written for you to fill in")
    return asked.method, "as asked"


def _check_read(asked: Asked, method: Method) -> None:
    """Raises UserError where an option says nothing, or the method does not read it."""
    for name, (readers, instead) in _OPTIONS.items():
        text: str | None = getattr(asked, name)
        if text is None:
            continue
        if method not in readers:
            chosen = "" if asked.method else ", which init chose,"
            raise UserError(f"--{name}: {method}{chosen} does not read it; {instead}, or leave it out")
        if not text.strip():
            raise UserError(f"--{name}: it is blank; give it a value, or leave it out")


def _sizes(model: str, method: Method, seen: _Seen, machine: Machine) -> _Sizes:
    """Lengths that leave one prompt in a hundred out at most, within what the model reads."""
    limit = positions(read_config(model, "--model")) or 1 << 20
    prompt = _up(_percentile(seen.prompt_tokens, 99), 32)
    own = _up(_percentile(seen.answer_tokens, 95), 32) if len(seen.answer_tokens) else 0
    answer = min(own or (256 if machine.gpus else 128), 1024)
    steering = 0 if method in ("dpo", "sft") else 128  # room for a principle before the prompt
    if prompt + steering + answer > limit:
        prompt = min(prompt, max(32, limit // 2))
        answer = min(answer, limit - prompt - steering)
    if answer < 1:
        raise ModelError(f"{model}: it reads {limit} tokens at most, too few for a prompt and its answer")
    weights = sum(math.prod(one.shape) for one in model_files(model, "--model").values())
    batch = 64 if machine.gpus else 32
    whole_pass = -(-len(seen.rows) // batch)
    most = 256 if machine.gpus else 32
    return _Sizes(
        prompt=prompt,
        answer=answer,
        whole=min(_up(prompt + steering + answer, 64), limit),
        batch=batch,
        steps=most if whole_pass > most else None,
        weights=f"{weights / 1e9:.1f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million",
        lr=next(lr for most_weights, lr in _RATES if weights <= most_weights),
    )


def _percentile(lengths: np.ndarray, percent: int) -> int:
    return int(np.percentile(lengths, percent, method="higher"))


def _up(number: int, to: int) -> int:
    return max(to, -(-number // to) * to)


def _split(rows: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Rows to learn on, and rows that no training sees, in the order of the file."""
    kept = set(Random(0).sample(range(len(rows)), min(MOST_HELD_BACK, max(2, int(len(rows) * HELD_BACK)))))
    return [row for i, row in enumerate(rows) if i not in kept], [row for i, row in enumerate(rows) if i in kept]


def _module(out: Path) -> str:
    """The package that `out` is from here. Raises UserError where its name is none."""
    try:
        parts = out.resolve().relative_to(Path.cwd()).parts
    except ValueError:
        parts = ("",)
    names = bool(parts) and all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)
    if not names or _taken(parts[0]):
        raise UserError(
            f"{out}: with --reward it should be a directory below this one, of a name that Python can import and that "
            "no other package has, such as my_run"
        )
    return ".".join(parts)


def _taken(name: str) -> bool:
    """Whether another package than a directory here would be imported by this name."""
    found = None if name == "__main__" else importlib.util.find_spec(name)
    return found is not None and Path.cwd() / name not in map(Path, found.submodule_search_locations or ())


_REWARD = '''"""What a good answer is, as a number: Plumbline calls `score` with many answers at a time."""

from collections.abc import Sequence

from plumbline.records import ScoreRequest


def score(requests: Sequence[ScoreRequest]) -> list[float]:
    """A finite number for each request, in their order; higher is better.

    A request has `messages` (the conversation, the user's turn last), `response` (the answer) and `extra` (the row's
    other columns).
    """
    return [variety(request.response) for request in requests]


def variety(answer: str) -> float:
    """An example to be replaced: the share of an answer's words that are said once, 0 where there are none."""
    words = answer.lower().split()
    return len(set(words)) / len(words) if words else 0.0
'''

_REWARD_TEST = '''"""A better answer gets a better number, and every answer a finite one: python -m pytest {module}"""

import math

from {module}.reward import score
from plumbline.records import Message, ScoreRequest


def asked(answer: str) -> ScoreRequest:
    return ScoreRequest(messages=(Message(role="user", content="Why is the sky blue?"),), response=answer)


def test_a_better_answer_has_a_higher_score() -> None:
    better, worse, blank = score([asked("Air scatters blue light most."), asked("blue blue blue blue"), asked("")])
    assert all(map(math.isfinite, (better, worse, blank)))
    assert better > worse
'''
