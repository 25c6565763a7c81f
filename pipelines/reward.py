"""Train a reward model: a one-logit sequence classifier, from labelled texts or preference pairs (Bradley-Terry)."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from actors.scorer import ScorerSpec
from actors.spawn import ask
from pipelines.batches import Batches
from pipelines.context import Context
from pipelines.loop import train_on
from plumbline.config.pipelines import RewardModel
from plumbline.config.section import planned
from plumbline.data.dataset import LabelledText
from plumbline.data.length_filter import AT_ONCE
from plumbline.data.reward_text import reward_texts
from plumbline.errors import RunError
from plumbline.records import PolicyRef, Prompt, Sample, ScoreRequest, TokenGroup
from plumbline.runs.disk import write_text
from plumbline.runs.policies import PROOF, version_directory


async def run_reward(context: Context, section: RewardModel) -> Path:
    """Train to the last batch, report held-out accuracy; returns the directory of the model."""
    batches, heldout, trained_on = await asyncio.to_thread(reward_batches, context, section)
    spec = context.learner_spec(section, len(batches), serves=False)
    await train_on(context, spec, batches)
    directory = version_directory(context.run_dir, PolicyRef(policy=section.name, version=len(batches)))
    await asyncio.to_thread(context.storage.pull_directory, directory, PROOF)  # the learner may be elsewhere
    accuracy = await heldout_accuracy(context, section, directory, heldout)
    figures = {"heldout_accuracy": accuracy, "heldout": len(heldout), "trained_on": trained_on}
    write_text(directory / "accuracy.json", json.dumps(figures))
    await asyncio.to_thread(context.storage.push, directory / "accuracy.json")
    context.events.write({"pipeline": section.name, **figures})
    context.events.say(f"{section.name}: held-out accuracy {accuracy:.4f} on {len(heldout)} rows; model in {directory}")
    return directory


Labelled = tuple[list[ScoreRequest], float]


def as_requests(rows: Sequence[LabelledText | Prompt]) -> list[Labelled]:
    """One labelled text, or (chosen, rejected) with label 1, once for each rejected one."""
    requests: list[Labelled] = []
    for row in rows:
        if isinstance(row, LabelledText):
            requests.append(([ScoreRequest(messages=row.messages or (), response=row.text)], row.label))
            continue
        for rejected in row.rejected:
            both = (row.chosen or "", rejected)
            requests.append(([ScoreRequest(messages=row.messages, response=text) for text in both], 1.0))
    return requests


def reward_batches(context: Context, section: RewardModel) -> tuple[Batches, list[Labelled], int]:
    """What it is trained on, what it is tried on, and of how many rows or pairs the former is.

    A sample is a group without a prompt: its responses are what the classifier reads.
    """
    train, heldout = map(as_requests, context.rows.rewards[section.name])
    if not heldout:  # the last twentieth is kept back
        train, heldout = train[: -max(1, len(train) // 20)], train[-max(1, len(train) // 20) :]

    def samples() -> Iterator[Sample]:
        for start in range(0, len(train), AT_ONCE):
            some = train[start : start + AT_ONCE]
            asked = [request for requests, _ in some for request in requests]
            longest = planned(section.max_len)
            texts = iter(reward_texts(context.tokenizer, asked, reads=section.reads, max_len=longest))
            for requests, label in some:
                own = list(islice(texts, len(requests)))
                yield Sample(group=TokenGroup([], [t.ids for t in own], [t.beside for t in own]), rewards=(label,))

    batches = Batches(samples(), section.learner.batch_size, section.epochs, context.config.seed)
    return batches, heldout, len(train)


async def heldout_accuracy(context: Context, section: RewardModel, directory: Path, rows: list[Labelled]) -> float:
    """Share of texts on the right side of 0, or of pairs in the right order, as the scorer actor judges them.

    Raises:
        RunError: the model that was trained fails on them.
    """
    longest = planned(section.max_len)
    spec = ScorerSpec(path=str(directory), reads=section.reads, max_len=longest, device=context.device)
    scorer = context.fleet.add_scorers(context.config.fleet.scorer.model_copy(update={"replicas": 1}), spec)[0]
    context.fleet.others.append(scorer)
    scores, failure = await ask(scorer.score.remote([request for requests, _ in rows for request in requests]))
    if failure:
        raise RunError(f"{directory}: cannot judge the held-out rows: {failure}")
    if section.source == "pairs":
        right = sum(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True))
    else:
        right = sum((score > 0) == (label > 0.5) for score, (_, label) in zip(scores, rows, strict=True))
    return right / len(rows)
