"""Train a reward model: a one-logit sequence classifier, from labelled texts or preference pairs (Bradley-Terry)."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from actors.scorer import ScorerSpec
from actors.spawn import ask
from pipelines.batches import Batches
from pipelines.context import Context
from pipelines.loop import train_on
from plumbline.config.pipelines import RewardModel
from plumbline.config.section import planned
from plumbline.data.dataset import LabelledText
from plumbline.data.reward_text import reward_text
from plumbline.records import PolicyRef, Prompt, Sample, ScoreRequest, TokenGroup
from plumbline.runs.disk import write_text
from plumbline.runs.policies import PROOF, version_directory


async def run_reward(context: Context, section: RewardModel) -> Path:
    """Train to the last batch, report held-out accuracy; returns the directory of the model."""
    train, heldout = map(as_requests, context.rows.rewards[section.name])
    if not heldout:  # the last twentieth is kept back
        train, heldout = train[: -max(1, len(train) // 20)], train[-max(1, len(train) // 20) :]
    batches = await asyncio.to_thread(
        Batches,
        (reward_sample(context, section, requests, label) for requests, label in train),
        section.learner.batch_size,
        section.epochs,
        context.config.seed,
    )
    spec = context.learner_spec(section, len(batches), serves=False)
    await train_on(context, spec, batches)
    directory = version_directory(context.run_dir, PolicyRef(policy=section.name, version=len(batches)))
    await asyncio.to_thread(context.storage.pull_directory, directory, PROOF)  # the learner may be elsewhere
    accuracy = await heldout_accuracy(context, section, directory, heldout)
    figures = {"heldout_accuracy": accuracy, "heldout": len(heldout), "trained_on": len(train)}
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


def reward_sample(context: Context, section: RewardModel, requests: list[ScoreRequest], label: float) -> Sample:
    """A group without a prompt: its responses are what the classifier reads."""
    texts = [
        reward_text(context.tokenizer, r.messages, r.response, reads=section.reads, max_len=planned(section.max_len))
        for r in requests
    ]
    return Sample(group=TokenGroup([], [t.ids for t in texts], [t.beside for t in texts]), rewards=(label,))


async def heldout_accuracy(context: Context, section: RewardModel, directory: Path, rows: list[Labelled]) -> float:
    """Share of texts on the right side of 0, or of pairs in the right order, as the scorer actor judges them."""
    longest = planned(section.max_len)
    spec = ScorerSpec(path=str(directory), reads=section.reads, max_len=longest, device=context.device)
    scorer = context.fleet.add_scorers(context.config.fleet.scorer.model_copy(update={"replicas": 1}), spec)[0]
    context.fleet.others.append(scorer)
    scores = await ask(scorer.score.remote([request for requests, _ in rows for request in requests]))
    if section.source == "pairs":
        right = sum(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True))
    else:
        right = sum((score > 0) == (label > 0.5) for score, (_, label) in zip(scores, rows, strict=True))
    return right / len(rows)
