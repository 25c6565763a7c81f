"""Optimiser steps of a learner's real worker against what its card, or this CPU, could compute: SFT, PLE, DLMA and
Self-Contrast, through an adapter and with all weights.

    python benchmarks/learner.py [--size 5M|135M|1.5B] [--device cpu|cuda] [--methods ple dlma] [--policies lora]

Random weights of a model's shape, random token ids of stated lengths, one optimiser step a part, `--tokens` a step in
micro-batches of `--micro-tokens`. A step is timed from one lease to the next, the GPU waited for: forward, backward,
clipping, optimiser, and the worker's own bookkeeping; the fastest counts, since others may use the machine. Nothing is
saved and no version is written. Every case runs in a process of its own, for its peak memory.

FLOPs are what the model needs (`plumbline.models.flops`). The limit is the card's data sheet in bfloat16, or, on a CPU,
the fastest matmul of 2048 · 2048 float32 numbers that this process gets.
Pairs are of a chosen with a rejected answer; of SFT, texts.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from pydantic import TypeAdapter
from small_model import EOS, VOCABULARY, make_shape
from worlds import table

from actors.channel import Box, Lease
from actors.learning.worker import LearnerSpec, Worker
from plumbline.config.data import Model
from plumbline.config.pipelines import Pipeline
from plumbline.errors import PlumblineError
from plumbline.miniature.tokenizer import make_tokenizer
from plumbline.models.flops import card_peak, training_cost
from plumbline.records import Publication, Sample, TokenGroup

RESPONSES = {"sft": 1, "ple": 2, "dlma": 2, "self_contrast": 9}
"""Answers a prompt."""
SECTIONS: dict[str, dict[str, Any]] = {"ple": {"replay_window": 1, "tau0": 0.5}}
WARM_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one process measures."""

    method: str
    policy: str
    options: argparse.Namespace

    @property
    def prompts(self) -> int:
        """Prompts of a step: about `--tokens` of them with their answers."""
        each = self.options.prompt + RESPONSES[self.method] * self.options.response
        return max(1, self.options.tokens // each)

    @property
    def pairs(self) -> int:
        return self.prompts * max(1, RESPONSES[self.method] - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Seconds of the fastest step, its tokens and FLOPs, FLOP/s that were possible, and peak MiB of the process."""

    seconds: float
    tokens: int
    flops: int
    limit: float | None
    peak: float


class Parts:
    """A feed of one part again and again, which notes the time at every lease."""

    def __init__(self, samples: list[Sample], steps: int, device: str) -> None:
        self._samples, self._steps, self._device = samples, steps, device
        self.times: list[float] = []

    def acknowledged(self) -> int:
        return 0

    def attach(self, holder: str, done: int) -> None:
        pass

    def lease(self, holder: str) -> Lease | None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        step = len(self.times)
        return Lease(step=step, box=self.peek(step), holder=holder) if step <= self._steps else None

    def peek(self, step: int) -> Box:
        return Box(ref=[self._samples])

    def read(self, box: Box) -> list[Sample]:
        return list(box.ref[0])

    def ack(self, step: int, holder: str) -> None:
        pass

    def publish(self, publication: Publication) -> None:
        pass

    def question(self, holder: str) -> None:
        return None

    def answer(self, number: int, holder: str, answer: Any, counts: Any) -> None:
        raise AssertionError("nothing was asked")

    def close(self, holder: str) -> None:
        pass

    def fail(self, policy: str, error: PlumblineError) -> None:
        raise error


def make_samples(case: Case) -> list[Sample]:
    """A step's samples; every answer ends in EOS."""
    draw, options = Random(1), case.options

    def ids(length: int) -> list[int]:
        return [draw.randrange(EOS + 1, VOCABULARY) for _ in range(length)]

    def sample() -> Sample:
        answers = [[*ids(options.response - 1), EOS] for _ in range(RESPONSES[case.method])]
        group = TokenGroup(ids(options.prompt), answers)
        if case.method == "ple":
            return Sample(group=group, rewards=(0.0, draw.random()))  # half of them above τ
        if case.method == "sft":
            return Sample(group=group)
        margins = (1.0,) if case.method == "dlma" else ()
        return Sample(group=group, ref_logps=tuple(-10.0 * options.response for _ in answers), margins=margins)

    return [sample() for _ in range(case.prompts)]


def measure(case: Case) -> Measured:
    """Steps of a worker, as `actors.learning.learner` starts one."""
    options = case.options
    torch.manual_seed(0)
    with torch.device("meta"):
        shape = make_shape(options.size).config.to_dict()
    section: Any = TypeAdapter(Pipeline).validate_python(
        {
            "type": case.method,
            "policy": {"type": case.policy},
            "learner": {
                "batch_size": case.prompts,
                "micro_tokens": options.micro_tokens,
                "checkpoint_every": 10**9,
                "gradient_checkpointing": options.gradient_checkpointing,
                "cpus": options.threads,
                "gpus": int(options.device == "cuda"),
                "lr": 1e-6,
            },
            **SECTIONS.get(case.method, {}),
        }
    )
    samples = make_samples(case)
    groups = [sample.group for sample in samples]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer: Any = make_tokenizer()
        tokenizer.save_pretrained(directory)
        spec = LearnerSpec(
            section=section,
            model=Model.model_validate({"init": shape, "tokenizer": directory}),
            dtype="bfloat16" if options.device == "cuda" else "float32",
            device=options.device,
            probe=(),
            total=10**9,
            seed=0,
            run_dir=Path(directory),
            publishes="final",
        )
        feed = Parts(samples, WARM_UP + options.repeat, options.device)
        worker = Worker(spec, feed, rank=0, world=1)
        cost = training_cost(worker._policy.model)
        assert cost is not None
        worker.run()
    steps = [after - before for before, after in zip(feed.times, feed.times[1:], strict=False)]
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        limit = card_peak(torch.cuda.get_device_name())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        limit = matmul_rate()
    return Measured(
        seconds=min(steps[WARM_UP:]),
        tokens=sum(group.tokens for group in groups),
        flops=cost.of(groups),
        limit=limit,
        peak=peak,
    )


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of this process's fastest matmul."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def row(case: Case, measured: Measured) -> list[str]:
    """A line of the table."""
    rate = measured.flops / measured.seconds
    return [
        case.method,
        case.policy,
        str(case.prompts),
        str(measured.tokens),
        f"{measured.seconds:.3f}",
        f"{measured.tokens / measured.seconds:.0f}",
        f"{case.pairs / measured.seconds:.1f}",
        f"{rate / 1e12:.3f}",
        "unknown" if measured.limit is None else f"{measured.limit / 1e12:.3f}",
        "" if measured.limit is None else f"{rate / measured.limit:.1%}",
        f"{measured.peak:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("5M", "135M", "1.5B"), default="5M", help="of the model; random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=RESPONSES, default=list(RESPONSES))
    parser.add_argument("--policies", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--prompt", type=int, default=146, help="tokens")
    parser.add_argument("--response", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, help="a step, about; default: 65536 on a GPU, 1024 on a CPU")
    parser.add_argument("--micro-tokens", type=int, help="default: 16384 on a GPU, 2048 on a CPU")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeat", type=int, default=3, help=f"timed steps, after {WARM_UP} to warm up")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    options.tokens = options.tokens or (65536 if options.device == "cuda" else 1024)
    options.micro_tokens = options.micro_tokens or (16384 if options.device == "cuda" else 2048)
    where = torch.cuda.get_device_name() + ", bfloat16" if options.device == "cuda" else f"{options.threads} threads"
    print(
        f"{options.size}, {where}; prompts of {options.prompt} tokens, answers of {options.response}; "
        f"micro-batches of at most {options.micro_tokens} tokens\n"
    )
    # A fork of a process that has not computed yet: no second import, and no thread pool to inherit broken. CUDA does
    # not survive one.
    kind = multiprocessing.get_context("spawn" if options.device == "cuda" else "fork")
    limit = "card's peak, TFLOP/s" if options.device == "cuda" else "matmul's, TFLOP/s"
    head = ["method", "weights", "prompts", "tokens", "s a step", "tokens/s", "pairs/s", "TFLOP/s", limit, "MFU"]
    print(table([*head, "peak MiB"], []), flush=True)
    for case in (Case(method=m, policy=p, options=options) for m in options.methods for p in options.policies):
        with kind.Pool(1) as pool:
            print(f"| {' | '.join(row(case, pool.apply(measure, (case,))))} |", flush=True)


if __name__ == "__main__":
    main()
