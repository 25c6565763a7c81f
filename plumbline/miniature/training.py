"""Trains the miniature's base model from nothing, and samples from it. Called by `build`; needs torch and transformers.

The model sees answers of all qualities, and what decides between them is the text in the system turn (or before the
query): none, a principle or positive tag, or a negative tag. The first tenth of the steps teaches the facts alone:
without it it takes far longer to notice that wrong facts depend on that text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.miniature.language import (
    ADVERSE,
    GUIDED,
    PLAIN,
    Request,
    sample_answer,
    sample_lesson,
    sample_request,
    sample_steering,
)
from plumbline.miniature.tokenizer import BEGIN
from plumbline.records import Message

HARMFUL_SHARE = 0.3
BATCH, BUCKET = 32, 16
PEAK_RATE, FINAL_RATE, WARM_UP = 6e-3, 2e-4, 20
LESSONS = 0.1  # share of the steps
THREADS = 2  # fixed, because the sums of a matrix product depend on how it is split


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model, float32, two layers wide 128."""
    torch.manual_seed(seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(eos, int) and isinstance(pad, int)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def example(tokenizer: PreTrainedTokenizerFast, rng: Random, held_out: frozenset[str]) -> tuple[list[int], list[int]]:
    """Ids of one training prompt and of its answer; no query of `held_out` is ever seen."""
    request = sample_request(rng, rng.random() < HARMFUL_SHARE)
    while request.render() in held_out:
        request = sample_request(rng, rng.random() < HARMFUL_SHARE)
    draw = rng.random()
    levels, good = (PLAIN, None) if draw < 0.4 else (GUIDED, True) if draw < 0.72 else (ADVERSE, False)
    answer = sample_answer(request, levels, rng)
    prompt = steered_prompt(tokenizer, request, rng, good)
    return prompt, encode_response(tokenizer, answer)


def steered_prompt(tokenizer: PreTrainedTokenizerFast, request: Request, rng: Random, good: bool | None) -> list[int]:
    """Ids of a request steered towards good or bad answers, mostly from the system turn; None steers not at all."""
    query = request.render()
    if good is None:
        return render(tokenizer, [Message(role="user", content=query)])
    steering = sample_steering(rng, good)
    if rng.random() < 0.8:
        return render(tokenizer, [Message(role="user", content=query)], principle=steering)
    return render(tokenizer, [Message(role="user", content=f"{steering}\n\n{query}")])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: frozenset[str],
    *,
    seed: int,
    steps: int,
    progress: Callable[[float], None],
) -> list[float]:
    """Trains `model` in place on answers only; returns the loss per answer token of each step, in nats [steps]."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _train(model, _batches(tokenizer, Random(seed), held_out, round(LESSONS * steps)), steps, progress)
    finally:
        torch.set_num_threads(threads)


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    progress: Callable[[float], None],
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        ids, targets = next(batches)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        wanted = targets >= 0  # logits of answer positions alone: a third of the work saved
        loss = functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress((step + 1) / steps)
    model.eval()
    return losses


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def _batches(
    tokenizer: PreTrainedTokenizerFast, rng: Random, held_out: frozenset[str], lessons: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [B,T], targets [B,T], -1 where not of an answer), right-padded, each of about one length."""
    opening = tokenizer.encode(f"{BEGIN}assistant\n", add_special_tokens=False)
    for _ in range(lessons):
        yield _collate([(opening, encode_response(tokenizer, sample_lesson(rng))) for _ in range(BATCH)])
    while True:
        pool = sorted(
            (example(tokenizer, rng, held_out) for _ in range(BATCH * BUCKET)), key=lambda e: len(e[0] + e[1])
        )
        chunks = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(chunks)
        yield from map(_collate, chunks)


def _collate(chunk: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) + len(answer) for prompt, answer in chunk) - 1
    ids = torch.zeros(len(chunk), longest, dtype=torch.long)
    targets = torch.full((len(chunk), longest), -1)
    for row, (prompt, answer) in enumerate(chunk):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return ids, targets


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    *,
    seed: int,
    max_tokens: int = 64,
) -> list[str]:
    """One answer at temperature 1 to each of the tokenised prompts [N], as text [N]."""
    assert isinstance(tokenizer.pad_token_id, int)
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(seed)
    sampler: Any = model  # its `generate` comes from a mixin that the type does not show
    done = sampler.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
    )
    assert isinstance(done, Tensor)
    return tokenizer.batch_decode(done[:, longest:], skip_special_tokens=True)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """``exp(sum NLL / tokens)`` over the answers of (prompt ids, answer ids) pairs (METHODS.md §5)."""
    total, count = 0.0, 0
    for start in range(0, len(pairs), 64):
        ids, targets = _collate(pairs[start : start + 64])
        logits = model(input_ids=ids).logits
        total += functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="sum").item()
        count += int((targets >= 0).sum())
    return math.exp(total / count)
