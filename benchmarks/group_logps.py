"""Time and peak memory of `group_logps` against the padded batches of the usual DPO trainers, forward and backward.

    python benchmarks/group_logps.py [--device cuda --size 135M --prompts 16] [--hh PAIRS.jsonl.gz --tokenizer DIR]

Peers, both plain torch with transformers' SDPA: *rows* pads one row per response; *pairs* pads two rows per pair, so
that the chosen answer is computed once per negative, as trainers that take pairs do. Responses of a shape are equally
long, so neither peer pays for padding here; what padding costs on real lengths is counted with --hh. Every case runs in
a process of its own, for its peak memory. On a GPU both sides compute in bfloat16, without cuDNN's attention, and
*flex* is ours with FlexAttention in place of `varlen_attn`.
"""

import argparse
import gzip
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flex import in_place_of_varlen
from small_model import VOCABULARY, make_shape
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.data.tokenizer import load_tokenizer
from plumbline.models.backend import set_up_torch
from plumbline.models.group_logps import disable_dropout, group_logps, pack
from plumbline.records import Message, TokenGroup

SHAPES = [(146, 64, 8), (400, 64, 8), (146, 256, 8), (64, 128, 1)]  # prompt, response, negatives


def shared(model: PreTrainedModel, groups: list[TokenGroup]) -> Tensor:
    return group_logps(model, groups)[0]


def flex(model: PreTrainedModel, groups: list[TokenGroup]) -> Tensor:
    with in_place_of_varlen():
        return shared(model, groups)


def rows(model: PreTrainedModel, groups: list[TokenGroup]) -> Tensor:
    return padded(model, [(g.prompt_ids, response) for g in groups for response in g.response_ids])


def pairs(model: PreTrainedModel, groups: list[TokenGroup]) -> Tensor:
    chosen = [(g.prompt_ids, g.response_ids[0]) for g in groups for _ in g.response_ids[1:]]
    return padded(model, chosen + [(g.prompt_ids, response) for g in groups for response in g.response_ids[1:]])


def padded(model: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """Summed log-probs [rows] of responses, from one right-padded batch."""
    ids = pad_sequence([torch.tensor(p + r) for p, r in sequences], batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones(len(p) + len(r), dtype=torch.long) for p, r in sequences], batch_first=True)
    scored = pad_sequence([torch.tensor([0.0] * len(p) + [1.0] * len(r)) for p, r in sequences], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask.to(ids.device), use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps * scored[:, 1:].to(ids.device)).sum(dim=1)


def measure(
    logps: Callable[[PreTrainedModel, list[TokenGroup]], Tensor],
    shape: tuple[int, int, int],
    options: argparse.Namespace,
) -> tuple[float, float]:
    """Fastest seconds of a forward and backward (others may use the machine), and peak MiB above the model's own."""
    device, prompts = options.device, options.prompts
    set_up_torch(torch.get_num_threads())
    torch.manual_seed(0)
    with torch.device(device):
        model = make_shape(options.size)
    if device == "cuda":
        model.bfloat16()
    disable_dropout(model)
    prompt, response, negatives = shape
    # The same in every case of a shape: the seed is set above.
    groups = [TokenGroup(_ids(prompt), [_ids(response) for _ in range(1 + negatives)]) for _ in range(prompts)]
    model(torch.tensor([_ids(8)], device=device))
    before = _peak()
    times: list[float] = []
    for _ in range(options.repeat + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        logps(model, groups).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    return min(times[1:]), _peak() - before


def _ids(length: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,)).tolist()


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def table(options: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"prompts a step: {options.prompts}, model: {options.size}, {where}; seconds · peak MiB")
    peers = [rows, pairs, *([flex] if options.device == "cuda" else [])]
    print(f"{'prompt/response/m':>18}{'shared':>16}" + "".join(f"{peer.__name__:>16}{'ratio':>8}" for peer in peers))
    for shape in SHAPES:
        results = []
        for logps in (shared, *peers):
            # A fork of a process that has not computed yet: no second import, and no thread pool to inherit broken.
            # CUDA does not survive one.
            kind = "spawn" if options.device == "cuda" else "fork"
            with multiprocessing.get_context(kind).Pool(1) as pool:
                results.append(pool.apply(measure, (logps, shape, options)))
        (own, peak), *others = results
        told = "".join(f"{seconds:>9.3f} ·{memory:>5.0f}{seconds / own:>7.1f}×" for seconds, memory in others)
        print(f"{'/'.join(map(str, shape)):>18}{own:>9.3f} ·{peak:>5.0f}{told}", flush=True)


def padding(path: Path, tokenizer_path: Path, rows_a_batch: int = 16) -> None:
    """Computed against useful tokens on real pairs: padded batches in file order, packed rows of the same budget."""
    tokenizer = load_tokenizer(str(tokenizer_path))
    groups: list[TokenGroup] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt = render(tokenizer, [Message(**turn) for turn in row["messages"]])
            answers = [encode_response(tokenizer, row[name], ended=False) for name in ("chosen", "rejected")]
            groups.append(TokenGroup(prompt, answers))

    lengths = [len(g.prompt_ids) + len(response) for g in groups for response in g.response_ids]
    batches = [lengths[start : start + rows_a_batch] for start in range(0, len(lengths), rows_a_batch)]
    computed = sum(len(batch) * max(batch) for batch in batches)
    useful = sum(lengths)
    own = sum(g.tokens for g in groups)
    micro_batches = pack(groups, computed // len(batches))
    assert sum(groups[index].tokens for indices in micro_batches for index in indices) == own
    print(f"\n{path.name}: {len(groups)} pairs, {rows_a_batch} rows a padded batch")
    print(f"  padded rows: {computed:,} computed, {useful:,} useful: {1 - useful / computed:.1%} padding")
    print(f"  packed rows: {own:,} computed in {len(micro_batches)} micro-batches, 0.0% padding, every prompt once")
    print(f"  padded rows compute {computed / own:.2f}× the tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="timed steps a case; the fastest counts")
    parser.add_argument("--prompts", type=int, default=1, help="prompts a step; more keep a GPU busy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("5M", "135M", "1.5B"), default="5M", help="of the model; random weights")
    parser.add_argument("--hh", type=Path, help="pairs as gzip JSON Lines: messages, chosen, rejected")
    parser.add_argument("--tokenizer", type=Path, help="a model directory whose tokenizer and template cut --hh")
    arguments = parser.parse_args()
    if (arguments.hh is None) != (arguments.tokenizer is None):
        parser.error("--hh and --tokenizer go together")
    table(arguments)
    if arguments.hh is not None:
        padding(arguments.hh, arguments.tokenizer)


if __name__ == "__main__":
    main()
