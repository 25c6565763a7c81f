"""Builds a miniature world on disk, or finds that it is there already. Called by the CLI, quickstart and the tests."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from plumbline.errors import DataError
from plumbline.miniature.language import (
    NEGATIVE_TAG,
    PLAIN,
    POSITIVE_TAG,
    PRINCIPLE,
    TARGET,
    Levels,
    Request,
    sample_answer,
    sample_request,
)
from plumbline.miniature.reward import reward

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STEPS = 600
HARMFUL_SHARE = 0.3
_MEASURED = 256  # held-out prompts behind each figure of world.json

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A world on disk. `figures` are what world.json says of it: mean reward, its spread, and perplexity.

    Keys: ``reward_plain``, ``reward_principle``, ``reward_positive``, ``reward_negative`` (answers of the base model),
    ``reward_target``, each with a ``_sd``, and ``perplexity`` of the targets under the plain prompt.
    """

    directory: Path
    seed: int
    figures: Mapping[str, float]

    @property
    def model(self) -> Path:
        """The base model: config, weights, tokenizer, chat template."""
        return self.directory / "model"

    @property
    def train(self) -> Path:
        """Training prompts: rows of id, prompt, target, topic, harmful."""
        return self.directory / "prompts_train.jsonl"

    @property
    def heldout(self) -> Path:
        """Held-out prompts, rows as in `train`; the model has seen none of them."""
        return self.directory / "prompts_heldout.jsonl"

    @property
    def embedder(self) -> Path:
        """A sentence-transformers model of the world's language."""
        return self.directory / "embedder"

    @property
    def preferences(self) -> Path:
        """Pairs that the ground truth orders: rows of id, prompt, chosen, rejected."""
        return self.directory / "preferences.jsonl"


def build_world(
    directory: Path,
    seed: int = 0,
    *,
    train_prompts: int = 2048,
    heldout_prompts: int = 512,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> World:
    """Makes the world of `seed` in `directory`, or returns at once where the same code has made it before.

    The same arguments give the same prompts everywhere and the same weights on the same machine. A world of other
    arguments or older code is replaced. It is written aside and renamed: a crash leaves no half world.

    Args:
        steps: optimiser steps of the base model; far fewer than the default give a model that knows nothing.
        progress: called with a stage's name and the share of it done, in [0, 1].

    Raises:
        DataError: `directory` exists and holds something other than a world.
    """
    report = progress or (lambda stage, share: None)
    directory = Path(directory)
    identity = {
        "seed": seed,
        "train_prompts": train_prompts,
        "heldout_prompts": heldout_prompts,
        "steps": steps,
        "code": _code_version(),
    }
    known = _existing(directory)
    if known is not None and known["identity"] == identity:
        report("ready", 1.0)
        return World(directory=directory, seed=seed, figures=known["figures"])
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        figures = _write(aside, seed, train_prompts, heldout_prompts, steps, report)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
        steering = {"principle": PRINCIPLE, "positive_tag": POSITIVE_TAG, "negative_tag": NEGATIVE_TAG}
        description = {"identity": identity, "versions": versions, "figures": figures, **steering}
        (aside / "world.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp makes it private
        _swap(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    report("ready", 1.0)
    return World(directory=directory, seed=seed, figures=figures)


def _swap(aside: Path, directory: Path) -> None:
    """Puts `aside` where `directory` is. An older world is renamed too: deleting in place could stop half-way."""
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    try:
        if directory.exists():
            os.rename(directory, old / "world")
        os.rename(aside, directory)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _existing(directory: Path) -> dict | None:
    """What an earlier world's world.json says; None where there is nothing to replace."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    try:
        known = json.loads((directory / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _foreign(directory) from error
    if not (isinstance(known, dict) and {"identity", "figures"} <= known.keys()):
        raise _foreign(directory)
    return known


def _foreign(directory: Path) -> DataError:
    return DataError(
        f"{directory} exists and is no miniature world (no readable world.json): name a new or an empty directory"
    )


def _code_version() -> str:
    """Changes with any source file that a world depends on."""
    here = Path(__file__).parent
    sources = [file for file in sorted(here.glob("*.py")) if not file.name.startswith("__")]
    sources.append(here.parent / "data" / "prompting.py")
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sources)).hexdigest()[:16]


def _write(
    directory: Path, seed: int, train_prompts: int, heldout_prompts: int, steps: int, report: Progress
) -> dict[str, float]:
    report("prompts", 0.0)
    requests = distinct_requests(train_prompts + heldout_prompts, seed)
    train, heldout = requests[:train_prompts], requests[train_prompts:]
    rows = prompt_rows(heldout, "heldout", seed)
    train_rows = prompt_rows(train, "train", seed)
    _write_rows(directory / "prompts_train.jsonl", train_rows)
    _write_rows(directory / "prompts_heldout.jsonl", rows)
    _write_rows(directory / "preferences.jsonl", preference_rows(train, seed))
    report("prompts", 1.0)

    from plumbline.miniature import training
    from plumbline.miniature.embedder import make_embedder
    from plumbline.miniature.tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    make_embedder(directory / "embedder", tokenizer, [str(row["target"]) for row in train_rows], seed)
    model = training.make_model(tokenizer, seed)
    seen = frozenset(request.render() for request in heldout)
    training.train(model, tokenizer, seen, seed=seed, steps=steps, progress=lambda share: report("model", share))
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    return _figures(model, tokenizer, rows[:_MEASURED], seed, report)


def distinct_requests(count: int, seed: int) -> list[Request]:
    """`count` requests, no two of one text, three of ten harmful."""
    rng = Random(f"requests {seed}")
    found: dict[str, Request] = {}
    while len(found) < count:
        request = sample_request(rng, rng.random() < HARMFUL_SHARE)
        found.setdefault(request.render(), request)
    return list(found.values())


def prompt_rows(requests: Sequence[Request], split: str, seed: int) -> list[dict[str, object]]:
    """Rows of id, prompt, target, topic, harmful; targets are good but not perfect (`language.TARGET`)."""
    rng = Random(f"targets {split} {seed}")
    return [
        {
            "id": f"{split}-{index:05d}",
            "prompt": request.render(),
            "target": sample_answer(request, TARGET, rng),
            "topic": request.topic.name,
            "harmful": request.harmful,
        }
        for index, request in enumerate(requests)
    ]


def preference_rows(requests: Sequence[Request], seed: int) -> list[dict[str, object]]:
    """Rows of id, prompt, chosen, rejected: two plain answers that differ in ground-truth reward, the better first."""
    rng = Random(f"preferences {seed}")
    return [
        {"id": f"preference-{index:05d}", "prompt": request.render(), **_pair(request, PLAIN, rng)}
        for index, request in enumerate(requests)
    ]


def _pair(request: Request, levels: Levels, rng: Random) -> dict[str, str]:
    prompt = request.render()
    while True:
        answers = [sample_answer(request, levels, rng) for _ in range(2)]
        rewards = [reward(prompt, answer) for answer in answers]
        if rewards[0] != rewards[1]:
            chosen, rejected = answers if rewards[0] > rewards[1] else answers[::-1]
            return {"chosen": chosen, "rejected": rejected}


def _write_rows(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _figures(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    rows: Sequence[Mapping[str, object]],
    seed: int,
    report: Progress,
) -> dict[str, float]:
    """See `World`; [N] held-out rows in, a handful of numbers out."""
    from plumbline.data.ending import encode_response
    from plumbline.data.prompting import render
    from plumbline.miniature import training
    from plumbline.records import Message

    queries = [str(row["prompt"]) for row in rows]
    answers = {"target": [str(row["target"]) for row in rows]}
    steerings = {"plain": None, "principle": PRINCIPLE, "positive": POSITIVE_TAG, "negative": NEGATIVE_TAG}
    for index, (name, text) in enumerate(steerings.items()):
        report("figures", index / len(steerings))
        prompts = [render(tokenizer, [Message(role="user", content=query)], principle=text) for query in queries]
        answers[name] = training.sample(model, tokenizer, prompts, seed=seed)
    figures: dict[str, float] = {}
    for name, texts in answers.items():
        rewards = [reward(query, text) for query, text in zip(queries, texts, strict=True)]
        figures[f"reward_{name}"] = round(statistics.fmean(rewards), 4)
        figures[f"reward_{name}_sd"] = round(statistics.pstdev(rewards), 4)
    plain = [render(tokenizer, [Message(role="user", content=query)]) for query in queries]
    targets = [encode_response(tokenizer, text) for text in answers["target"]]
    figures["perplexity"] = round(training.perplexity(model, list(zip(plain, targets, strict=True))), 4)
    report("figures", 1.0)
    return figures
