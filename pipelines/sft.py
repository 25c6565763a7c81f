"""Supervised fine-tuning on (prompt, target): a pipeline of its own, or the stage that makes π0 before the others."""

import asyncio
import random
from collections.abc import Callable

from pipelines.context import Context
from pipelines.loop import train_on
from plumbline.config.pipelines import Sft
from plumbline.data.length_filter import sft_group
from plumbline.records import PolicyRef, Sample
from plumbline.runs.policies import PROOF, version_directory


async def run_sft(
    context: Context, section: Sft, *, serves: bool, begun: Callable[[str], None] = lambda _: None
) -> str:
    """Train to the last batch; returns the directory of the final version.

    Args:
        serves: an adapter's versions are published for generators; else there is one whole model at the end.
        begun: called once it trains, with the directory where the final version will be.
    """
    samples = sft_samples(context)
    batches = shuffled_batches(samples, section.learner.batch_size, section.epochs, context.config.seed)
    spec = context.learner_spec(section, len(batches), serves=serves)
    final = PolicyRef(policy=section.name, version=len(batches))
    directory = version_directory(context.run_dir, final)
    await train_on(context, spec, batches, lambda: begun(str(directory)))
    await asyncio.to_thread(context.storage.pull_directory, directory, PROOF)  # the learner may be elsewhere
    assert directory.is_dir(), directory
    return str(directory)


def sft_samples(context: Context) -> list[Sample]:
    """(plain prompt, target with EOS) of every prompt within the limits."""
    groups = (sft_group(context.config, context.tokenizer, prompt) for prompt in context.prompts)
    return [Sample(group=group) for group in groups if group]


def shuffled_batches(samples: list[Sample], size: int, epochs: int, seed: int) -> list[list[Sample]]:
    """Every sample once an epoch, in an order of its own each epoch."""
    batches = []
    for epoch in range(epochs):
        order = list(samples)
        random.Random(f"{seed}-{epoch}").shuffle(order)
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches
