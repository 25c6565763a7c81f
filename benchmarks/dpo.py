"""Pairs a second and peak memory of our multi-negative DPO step against TRL's `DPOTrainer`, in one run.

    python benchmarks/dpo.py [--quick] [--repeat 4] [--threads 2] [--device cpu|cuda] [--size 5M|135M|1.5B] [--pairs 64]

Same random model, same token ids, same AdamW with the same clipping, as many pairs an optimiser step on both sides, no
gradient checkpointing, reference log-probs by a second, frozen model included. On a CPU both compute in float32. On a
GPU in bfloat16: ours as learners do, on bfloat16 weights with float32 copies for the optimiser; TRL as it does with
`bf16`, on float32 weights under autocast; both references are bfloat16. TRL gets the texts of those ids through a
tokenizer of one word an id. Its padding-free mode is switched off in 1.16; responses of a shape are equally long, so it
pays for no padding. Each side gets the batch size (pairs a forward, accumulated to a step's) that is fastest; one that
does not fit on the card is left out.

Policy and reference differ, so that the first loss is not ln 2 whatever the log-probs are, and both sides must agree to
1e-3 (in bfloat16 5e-2) on the losses of the first two steps, the second of which has seen the gradients of the first.
Every case runs in a process of its own, for its peak memory: on a CPU what it needs above the loaded models, on a GPU
all that its tensors take. The fastest step counts, since others may use the machine.
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

import torch

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})

from datasets import Dataset, disable_progress_bars
from small_model import EOS, PAD, VOCABULARY, make_model, make_shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from actors.learning.strategy import Masters
from plumbline.methods.losses import dpo_loss
from plumbline.models.backend import set_up_torch
from plumbline.models.group_logps import group_logps
from plumbline.records import TokenGroup

TARGETS = {(146, 256, 8): 3.0, (146, 64, 8): 6.0, (400, 64, 8): 10.0, (64, 128, 1): 1.3}  # prompt, response, negatives
LR, BETA, CLIP = 1e-4, 0.1, 1.0
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}  # of a loss

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all cases have in common; `pairs` are those of an optimiser step, as 8 prompts with 8 negatives are 64."""

    device: str
    size: str
    pairs: int
    repeat: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case: pairs a forward and a step, seconds of every timed step, losses of all steps, peak MiB."""

    batch: int
    pairs: int
    seconds: list[float]
    losses: list[float]
    peak: float

    @property
    def pairs_per_second(self) -> float:
        return self.pairs / min(self.seconds)


Side = Callable[[Setting, Shape, int], Measured]


def make_policy(setting: Setting, noise: float, dtype: torch.dtype) -> Any:
    """A model on the device; `noise` sets the policy apart from the reference."""
    set_up_torch(setting.threads)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model: Any = make_model(tied=False) if setting.size == "5M" else make_shape(setting.size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.to(dtype)


def make_groups(shape: Shape, pairs: int, steps: int) -> list[list[TokenGroup]]:
    """The groups of every step; all responses end in EOS, as TRL makes them."""
    prompt, response, negatives = shape
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(EOS + 1, VOCABULARY, (length,), generator=generator).tolist()

    def group() -> TokenGroup:
        return TokenGroup(ids(prompt), [[*ids(response - 1), EOS] for _ in range(1 + negatives)])

    return [[group() for _ in range(pairs // negatives)] for _ in range(steps)]


def now(device: str) -> float:
    """Seconds, once the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(setting: Setting, shape: Shape, batch: int) -> Measured:
    """One shared-prefix forward of `batch` pairs by the policy, and one by the reference."""
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    policy = make_policy(setting, 0.01, dtype)
    reference = make_policy(setting, 0.0, dtype).requires_grad_(False)
    steps = make_groups(shape, setting.pairs, setting.repeat + 1)
    masters = Masters(list(policy.parameters()))
    optimizer = torch.optim.AdamW(masters.parameters, lr=LR, weight_decay=0.0, fused=True)
    before = loaded(setting.device)
    losses: list[float] = []
    seconds: list[float] = []
    for groups in steps:
        started = now(setting.device)
        losses.append(0.0)
        forwards = setting.pairs // batch
        for part in (groups[i::forwards] for i in range(forwards)):
            with torch.no_grad():
                ref_logps, _ = group_logps(reference, part)
            logps, _ = group_logps(policy, part)
            loss, _ = dpo_loss(logps[:, 0], logps[:, 1:], ref_logps[:, 0], ref_logps[:, 1:], beta=BETA)
            (loss / forwards).backward()
            losses[-1] += loss.item() / forwards
        torch.nn.utils.clip_grad_norm_(masters.parameters, CLIP)
        optimizer.step()
        masters.write_back()
        optimizer.zero_grad()
        seconds.append(now(setting.device) - started)
    taken = peak(setting.device) - before
    return Measured(batch=batch, pairs=setting.pairs, seconds=seconds[1:], losses=losses, peak=taken)


def trl(setting: Setting, shape: Shape, batch: int) -> Measured:
    """TRL's own training loop, timed from the end of one optimiser step to the end of the next."""
    for library in ("trl", "accelerate", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    steps = make_groups(shape, setting.pairs, setting.repeat + 1)
    half = setting.device == "cuda"
    losses: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(now(setting.device))

    class Trainer(DPOTrainer):
        def training_step(self, *args: Any, **options: Any) -> Any:
            loss = super().training_step(*args, **options)  # already divided by the number of forwards of a step
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as directory:
        config = DPOConfig(
            output_dir=directory,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=setting.pairs // batch,
            max_steps=len(steps),
            beta=BETA,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            max_length=None,
            gradient_checkpointing=False,
            bf16=half,
            use_cpu=not half,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            make_policy(setting, 0.01, torch.float32),
            ref_model=make_policy(setting, 0.0, torch.bfloat16 if half else torch.float32),
            args=config,
            train_dataset=Dataset.from_list([row for groups in steps for g in groups for row in texts(g)]),
            processing_class=make_tokenizer(),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        check_ids(trainer, steps)
        before = loaded(setting.device)
        trainer.train()
    forwards = setting.pairs // batch
    return Measured(
        batch=batch,
        pairs=setting.pairs,
        seconds=[after - start for start, after in pairwise(ends)],
        losses=[sum(losses[start : start + forwards]) for start in range(0, len(losses), forwards)],
        peak=peak(setting.device) - before,
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


def peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def loaded(device: str) -> float:
    """MiB that do not count: on a CPU the libraries, and the models, which take as much on both sides."""
    return 0.0 if device == "cuda" else peak(device)


def try_one(side: Side, setting: Setting, shape: Shape, batch: int) -> Measured | None:
    """What `side` measures; None where it does not fit on the card."""
    try:
        return side(setting, shape, batch)
    except torch.OutOfMemoryError:
        return None


def fastest(side: Side, setting: Setting, shape: Shape, batches: Sequence[int]) -> Measured:
    """The batch size that runs fastest, each tried in a process of its own: on a CPU a fork of this one, which has not
    computed yet: no second import, and no thread pool to inherit broken. CUDA does not survive one."""
    tried: list[Measured] = []
    kind = multiprocessing.get_context("spawn" if setting.device == "cuda" else "fork")
    for batch in batches:
        with kind.Pool(1) as pool:
            if measured := pool.apply(try_one, (side, setting, shape, batch)):
                tried.append(measured)
    if not tried:
        raise SystemExit(f"{shape}: {side.__name__} fits on the card with none of the batch sizes {list(batches)}")
    return max(tried, key=lambda one: one.pairs_per_second)


def read_setting() -> tuple[Setting, list[int]]:
    """What the command line asks for, and the batch sizes to try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=4, help="timed optimiser steps a case, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("5M", "135M", "1.5B"), default="5M", help="of the model; random weights")
    parser.add_argument("--pairs", type=int, help="an optimiser step, a multiple of 8; default: 64 on a GPU, else 8")
    parser.add_argument("--quick", action="store_true", help="two timed steps, and one batch size, often the fastest")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    pairs = options.pairs or (64 if options.device == "cuda" else 8)
    if pairs < 8 or pairs % 8:
        parser.error(f"--pairs {pairs}: it should be a multiple of 8, the most negatives of a prompt")
    setting = Setting(
        device=options.device,
        size=options.size,
        pairs=pairs,
        repeat=2 if options.quick else options.repeat,
        threads=options.threads,
    )
    batches = [2 if options.device == "cpu" else 16] if options.quick else [1, 2, 4, 8, 16, 32, 64]
    return setting, [batch for batch in batches if pairs % batch == 0]


def main() -> None:
    setting, batches = read_setting()
    cpu = f"float32, {setting.threads} threads of {os.cpu_count()} processors"
    where = f"bfloat16, {torch.cuda.get_device_name()}" if setting.device == "cuda" else cpu
    print(
        f"{setting.pairs} pairs an optimiser step, {setting.size} parameters, {where}, trl {version('trl')}, "
        f"torch {torch.__version__}\n"
    )
    print(
        "| prompt/response/m | ours, pairs/s (batch) | TRL, pairs/s (batch) | ratio | target | ours, peak MiB "
        "| TRL, peak MiB | losses of steps 1 and 2, ours | TRL's |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---|---|", flush=True)
    for shape, target in TARGETS.items():
        own = fastest(ours, setting, shape, sorted({max(batch, shape[2]) for batch in batches}))
        peer = fastest(trl, setting, shape, batches)
        if max(abs(a - b) for a, b in zip(own.losses[:2], peer.losses[:2], strict=True)) > TOLERANCE[setting.device]:
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
