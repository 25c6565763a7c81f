"""Prompts a minute that DLMA generates and judges, against plain transformers as the method's own code does it.

    python benchmarks/dlma.py [--prompts 1024] [--peer-prompts 256] [--model DIR --data FILE] [--out runs/dlma]

Ours is a run of the pipeline with `train: false`, counted from its first request to its last part: vLLM, the reference
actor, parts on disk; it makes six log-probs a prompt, the two that DPO needs included. The peer is `generate` over
left-padded batches, once a contrastive prompt, then four padded forwards a batch of pairs; it gets both processors and
the batch size that is fastest. Same model, prompts, contrastive prompts and sampling; fp32. Starting up counts on
neither side. The samples differ, so their mean length and mean margin are printed to show that both sides do the same.

Default: the miniature world of seed 0.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from worlds import events, make_world, table

from plumbline.data.dataset import read_prompts
from plumbline.data.ending import turn_end
from plumbline.data.prompting import render
from plumbline.data.tokenizer import load_tokenizer
from plumbline.records import Prompt

POSITIVE = "Give a lawful, correct, polite and complete answer."
NEGATIVE = "Give an unlawful, false, rude and incomplete answer."
MAX_TOKENS = 64
STEP = 64
BATCHES = (1, 8, 32, 128)
TARGET = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Prompts a minute, mean tokens of an answer, mean of R."""

    rate: float
    tokens: float
    margin: float


def ours(out: Path, model: Path, data: Path, prompts: int) -> Measured:
    """The pipeline, from its first request to its last part."""
    directory = out / "run"
    pipeline = {
        "type": "dlma",
        "train": False,
        "steps": prompts // STEP,
        "batch_size": STEP,
        "contrast": {"positive": POSITIVE, "negative": NEGATIVE},
        "generation": {"max_tokens": MAX_TOKENS},
    }
    config: dict[str, Any] = {
        "name": "dlma",
        "model": {"path": str(model), "max_len": 256},
        "data": {"train": {"path": str(data)}, "max_prompt_tokens": 96},
        "pipelines": [pipeline],
        "fleet": {
            "generator": {"replicas": 2},  # the peer has both processors too
            "reference": {"cache": str(out / "cache")},  # an earlier run's log-probs would be a gift
        },
    }
    if not directory.exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / "dlma.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "cli", "run", str(out / "dlma.yaml"), "--run-dir", str(directory)]
        subprocess.run(command, check=True, stdout=2)
    steps = events(directory, "dlma")
    parts = (directory / "pairs/dlma").glob("step-*.parquet")
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    drawn = len(rows) + sum(step["rejected"] for step in steps)
    return Measured(
        rate=60 * drawn / max(step["elapsed"] for step in steps),
        tokens=sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows) / 2 / len(rows),
        margin=sum(row["margin"] for row in rows) / len(rows),
    )


class Peer:
    """Plain transformers on all processors."""

    def __init__(self, model: Path) -> None:
        self.tokenizer: Any = load_tokenizer(str(model))
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.pad = self.tokenizer.pad_token_id or 0
        self.eos = turn_end(self.tokenizer)

    def measure(self, prompts: list[Prompt], batch: int) -> Measured:
        torch.manual_seed(0)
        margins: list[float] = []
        tokens = 0
        started = time.perf_counter()
        for start in range(0, len(prompts), batch):
            asked = [
                [
                    render(self.tokenizer, prompt.messages, principle=steering)
                    for prompt in prompts[start : start + batch]
                ]
                for steering in (POSITIVE, NEGATIVE)
            ]
            answers = [self.generate(one) for one in asked]
            first, second = ([self.score(prompt, answer) for prompt in asked] for answer in answers)
            margins += ((first[0] - first[1]) - (second[0] - second[1])).tolist()
            tokens += sum(len(one) for side in answers for one in side)
        minutes = (time.perf_counter() - started) / 60
        return Measured(
            rate=len(prompts) / minutes, tokens=tokens / 2 / len(prompts), margin=sum(margins) / len(margins)
        )

    @torch.no_grad()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Answers with their EOS, where they ended."""
        ids = pad_sequence(
            [torch.tensor(one) for one in prompts], batch_first=True, padding_value=self.pad, padding_side="left"
        )
        mask = pad_sequence([torch.ones(len(one)) for one in prompts], batch_first=True, padding_side="left").long()
        drawn = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=self.pad,
            eos_token_id=self.eos,
        )
        new = drawn[:, ids.shape[1] :].tolist()
        return [one[: one.index(self.eos) + 1] if self.eos in one else one for one in new]

    @torch.no_grad()
    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        """Summed log-probs [B] of answers without EOS, from one right-padded batch."""
        pairs = [(p, a[:-1] if a[-1:] == [self.eos] else a) for p, a in zip(prompts, answers, strict=True)]
        ids = pad_sequence([torch.tensor(p + a) for p, a in pairs], batch_first=True, padding_value=self.pad)
        mask = pad_sequence([torch.ones(len(p) + len(a)) for p, a in pairs], batch_first=True).long()
        scored = pad_sequence([torch.tensor([0.0] * len(p) + [1.0] * len(a)) for p, a in pairs], batch_first=True)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logps * scored[:, 1:]).double().sum(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1024, help="of our run, a multiple of 64")
    parser.add_argument("--peer-prompts", type=int, default=256, help="of each of the peer's batch sizes")
    parser.add_argument("--model", type=Path, help="default: the miniature world's")
    parser.add_argument("--data", type=Path, help="its prompts")
    parser.add_argument("--out", type=Path, default=Path("runs/dlma"))
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    out = options.out.absolute()
    if options.model is None:
        world = make_world(out / "world-0", seed=0)
        options.model, options.data = world / "model", world / "prompts_train.jsonl"
    own = ours(out, options.model.absolute(), options.data.absolute(), options.prompts)
    peer = Peer(options.model)
    prompts = read_prompts(str(options.data), limit=options.peer_prompts)
    tried = {batch: peer.measure(prompts, batch) for batch in BATCHES}
    best = max(tried.values(), key=lambda one: one.rate)
    rows = [
        [name, f"{one.rate:.0f}", f"{one.tokens:.1f}", f"{one.margin:+.1f}"]
        for name, one in {"ours": own, **{f"transformers, batch {batch}": one for batch, one in tried.items()}}.items()
    ]
    print(table(["", "prompts/minute", "tokens an answer", "mean R"], rows))
    least = min(tried.values(), key=lambda one: one.rate)
    print(
        f"\n{own.rate / best.rate:.1f}× the peer's best batch, {own.rate / least.rate:.1f}× its worst "
        f"(to reach: {TARGET:g}×), {torch.get_num_threads()} threads for the peer"
    )


if __name__ == "__main__":
    main()
