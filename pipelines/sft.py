"""Supervised fine-tuning on (prompt, target): a pipeline of its own, or the stage that makes π0 before the others."""

import asyncio
from collections.abc import Callable, Iterator

from pipelines.batches import Batches
from pipelines.context import Context
from pipelines.loop import train_on
from plumbline.config.pipelines import Sft
from plumbline.data.ending import encode_responses
from plumbline.data.length_filter import AT_ONCE, BAD
from plumbline.data.prompting import render_all
from plumbline.records import PolicyRef, Sample, TokenGroup
from plumbline.runs.policies import PROOF, version_directory


async def run_sft(
    context: Context, section: Sft, *, serves: bool, begun: Callable[[str], None] = lambda _: None
) -> str:
    """Train to the last batch; returns the directory of the final version.

    Args:
        serves: an adapter's versions are published for generators; else there is one whole model at the end.
        begun: called once it trains, with the directory where the final version will be.
    """
    batches = await asyncio.to_thread(sft_batches, context, section)
    if unfit := [one for one in context.rows.fits[section.name].unfit if one.reason != BAD]:
        first = unfit[0].prompt.row
        context.events.say(f"{section.name}: {len(unfit)} rows are too long and left out; the first is row {first}")
    spec = context.learner_spec(section, len(batches), serves=serves)
    final = PolicyRef(policy=section.name, version=len(batches))
    directory = version_directory(context.run_dir, final)
    await train_on(context, spec, batches, lambda: begun(str(directory)))
    await asyncio.to_thread(context.storage.pull_directory, directory, PROOF)  # the learner may be elsewhere
    assert directory.is_dir(), directory
    return str(directory)


def sft_batches(context: Context, section: Sft) -> Batches:
    """(plain prompt, target with EOS) of every prompt within the limits."""
    prompts = context.rows.fits[section.name].prompts

    def samples() -> Iterator[Sample]:
        for start in range(0, len(prompts), AT_ONCE):
            some = prompts[start : start + AT_ONCE]
            rendered = render_all(context.tokenizer, [(prompt.messages, None) for prompt in some])
            targets = encode_responses(context.tokenizer, [prompt.target or "" for prompt in some])
            yield from (Sample(group=TokenGroup(ids, [own])) for ids, own in zip(rendered, targets, strict=True))

    return Batches(samples(), section.learner.batch_size, section.epochs, context.config.seed)
