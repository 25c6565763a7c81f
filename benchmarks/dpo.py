"""Pairs a second and peak memory of our multi-negative DPO step against TRL's `DPOTrainer`, in one run.

    python benchmarks/dpo.py [--quick] [--repeat 4] [--threads 2]

Same random model, same token ids, same AdamW with the same clipping, eight pairs an optimiser step on both sides,
fp32, no gradient checkpointing, reference log-probs by a second, frozen model included. TRL gets the texts of those ids
through a tokenizer of one word an id. Its padding-free mode is switched off in 1.16; responses of a shape are equally
long, so it pays for no padding. Each side gets the batch size (pairs a forward, accumulated to eight) that is fastest.

Policy and reference differ, so that the first loss is not ln 2 whatever the log-probs are, and both sides must agree to
1e-3 on the losses of the first two steps, the second of which has seen the gradients of the first. Every case runs in a
process of its own, for its peak memory; the fastest step counts, since others may use the machine.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

import torch
from datasets import Dataset, disable_progress_bars
from small_model import EOS, PAD, VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2ForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from plumbline.methods.losses import dpo_loss
from plumbline.models.group_logps import group_logps
from plumbline.records import TokenGroup

TARGETS = {(146, 256, 8): 3.0, (146, 64, 8): 6.0, (400, 64, 8): 10.0, (64, 128, 1): 1.3}  # prompt, response, negatives
PAIRS = 8  # an optimiser step: one prompt with eight negatives, or eight prompts with one
LR, BETA, CLIP = 1e-4, 0.1, 1.0
TOLERANCE = 1e-3  # of a loss

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case: pairs a forward, seconds of every timed step, losses of all steps, peak MiB above the loaded models."""

    batch: int
    seconds: list[float]
    losses: list[float]
    peak: float

    @property
    def pairs_per_second(self) -> float:
        return PAIRS / min(self.seconds)


def make_policy(noise: float) -> Qwen2ForCausalLM:
    """`noise` sets the policy apart from the reference."""
    torch.manual_seed(0)
    model = make_model(tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model


def make_groups(shape: Shape, steps: int) -> list[list[TokenGroup]]:
    """The groups of every step; all responses end in EOS, as TRL makes them."""
    prompt, response, negatives = shape
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(EOS + 1, VOCABULARY, (length,), generator=generator).tolist()

    def group() -> TokenGroup:
        return TokenGroup(ids(prompt), [[*ids(response - 1), EOS] for _ in range(1 + negatives)])

    return [[group() for _ in range(PAIRS // negatives)] for _ in range(steps)]


def ours(shape: Shape, repeat: int, batch: int) -> Measured:
    """One shared-prefix forward of `batch` pairs by the policy, and one by the reference."""
    policy, reference = make_policy(0.01), make_policy(0.0).requires_grad_(False)
    steps = make_groups(shape, repeat + 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    before = peak()
    losses: list[float] = []
    seconds: list[float] = []
    for groups in steps:
        started = time.perf_counter()
        losses.append(0.0)
        forwards = PAIRS // batch
        for part in (groups[i::forwards] for i in range(forwards)):
            with torch.no_grad():
                ref_logps, _ = group_logps(reference, part)
            logps, _ = group_logps(policy, part)
            loss, _ = dpo_loss(logps[:, 0], logps[:, 1:], ref_logps[:, 0], ref_logps[:, 1:], beta=BETA)
            (loss / forwards).backward()
            losses[-1] += loss.item() / forwards
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return Measured(batch=batch, seconds=seconds[1:], losses=losses, peak=peak() - before)


def trl(shape: Shape, repeat: int, batch: int) -> Measured:
    """TRL's own training loop, timed from the end of one optimiser step to the end of the next."""
    for library in ("trl", "accelerate", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    steps = make_groups(shape, repeat + 1)
    losses: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

    class Trainer(DPOTrainer):
        def training_step(self, *args: Any, **options: Any) -> Any:
            loss = super().training_step(*args, **options)  # already divided by the number of forwards of a step
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as directory:
        config = DPOConfig(
            output_dir=directory,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=PAIRS // batch,
            max_steps=len(steps),
            beta=BETA,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            make_policy(0.01),
            ref_model=make_policy(0.0),
            args=config,
            train_dataset=Dataset.from_list([row for groups in steps for g in groups for row in texts(g)]),
            processing_class=make_tokenizer(),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        check_ids(trainer, steps)
        before = peak()
        trainer.train()
    forwards = PAIRS // batch
    return Measured(
        batch=batch,
        seconds=[after - start for start, after in pairwise(ends)],
        losses=[sum(losses[start : start + forwards]) for start in range(0, len(losses), forwards)],
        peak=peak() - before,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word an id."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(EOS + 1, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def texts(group: TokenGroup) -> list[dict[str, str]]:
    """A group as TRL's pairs; it adds EOS to the answers itself."""
    prompt, chosen, *rejected = (
        "".join(f"w{i} " for i in ids) for ids in (group.prompt_ids, *(r[:-1] for r in group.response_ids))
    )
    return [{"prompt": prompt, "chosen": chosen, "rejected": one} for one in rejected]


def check_ids(trainer: DPOTrainer, steps: list[list[TokenGroup]]) -> None:
    """TRL must see the ids that we see."""
    ours = [(g.prompt_ids, g.response_ids[0], r) for groups in steps for g in groups for r in g.response_ids[1:]]
    rows: Any = trainer.train_dataset
    assert ours == [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def fastest(
    side: Callable[[Shape, int, int], Measured], shape: Shape, repeat: int, batches: Sequence[int], threads: int
) -> Measured:
    """The batch size that runs fastest, each tried in a fork of this process, which has not computed yet: no second
    import, and no thread pool to inherit broken."""
    tried: list[Measured] = []
    for batch in batches:
        with multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (threads,)) as pool:
            tried.append(pool.apply(side, (shape, repeat, batch)))
    return max(tried, key=lambda one: one.pairs_per_second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=4, help="timed optimiser steps a case, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two timed steps, and one batch size, often the fastest")
    options = parser.parse_args()
    repeat = 2 if options.quick else options.repeat
    print(
        f"{PAIRS} pairs an optimiser step, 5M-parameter Qwen2, fp32, {options.threads} threads of {os.cpu_count()} "
        f"processors, trl {version('trl')}, torch {torch.__version__}\n"
    )
    print(
        "| prompt/response/m | ours, pairs/s (batch) | TRL, pairs/s (batch) | ratio | target | ours, peak MiB "
        "| TRL, peak MiB | losses of steps 1 and 2, ours | TRL's |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---|---|", flush=True)
    for shape, target in TARGETS.items():
        tried = [2] if options.quick else [1, 2, 4, 8]
        own = fastest(ours, shape, repeat, sorted({max(batch, shape[2]) for batch in tried}), options.threads)
        peer = fastest(trl, shape, repeat, tried, options.threads)
        if max(abs(a - b) for a, b in zip(own.losses[:2], peer.losses[:2], strict=True)) > TOLERANCE:
            raise SystemExit(f"{shape}: the two sides compute different losses: {own.losses}, TRL {peer.losses}")
        cells = [
            "/".join(map(str, shape)),
            *(f"{side.pairs_per_second:.1f} ({side.batch})" for side in (own, peer)),
            f"{own.pairs_per_second / peer.pairs_per_second:.1f}×",
            f"{target:g}×",
            *(f"{side.peak:.0f}" for side in (own, peer)),
            *(" ".join(f"{loss:.4f}" for loss in side.losses[:2]) for side in (own, peer)),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
