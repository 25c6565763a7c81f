"""Wrong requests by the thousand, at an endpoint that runs: none may be a server error, and none may hang it.

    python benchmarks/mutations.py --url http://127.0.0.1:8000 --count 10000

Each is a right request of a seed with up to three things wrong: a field gone, or of another type or value, a field that
nobody knows, bytes of the body cut off or changed. Half of those that are meant to stream hang up early.
"""

import argparse
import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from random import Random
from typing import Any

import httpx

RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "base",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does it eat?"}],
        "max_tokens": 2,
        "temperature": 0.7,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["."],
    },
    "/v1/completions": {
        "model": "base",
        "prompt": ["The goat", "A cat"],
        "max_tokens": 2,
        "n": 2,
        "logit_bias": {"5": 1.5},
        "logprobs": 1,
        "echo": True,
    },
}
FIELDS = (
    "best_of", "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens", "messages",
    "metadata", "min_p", "model", "n", "presence_penalty", "prompt", "repetition_penalty", "response_format", "seed",
    "stop", "stream", "stream_options", "suffix", "temperature", "tool_choice", "tools", "top_k", "top_logprobs",
    "top_p", "user", "priority", "chat_template", "ignore_eos", "lora_request", "prompt_embeds", "role",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 3, 2**31, 2**63, -(2**63) - 1, 10**40, 0.0, -0.0, 1e-300, 1e308, 0.5, 2.5, -1.5,
    float("nan"), float("inf"), "", " ", "a", "\x00", "\ud800", "💥" * 50, "../../etc/passwd", "%s{}", "1", "a" * 3000,
    [], [[]], [None], [0], [1, 2, 3], [-1], [2**40], ["a"], ["", "b"], ["a"] * 300, [[1], [2]], [[1], "a"], {},
    {"a": 1},
    {"type": "text"}, {"type": "json_object"}, {"5": 1}, {"-1": 1}, {"99999999": 1}, {"x": 1}, {"5": "a"}, {"5": None},
    {"include_usage": True}, {"include_usage": 3}, [{"role": "user", "content": "a"}], [{"role": "user"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": None}], [{"role": "assistant", "content": "a", "tool_calls": [{}]}], "ple", "ple@1",
    [{"role": "user", "content": 3}], [{"role": "user", "content": {"a": 1}}],
    [{"role": "user", "content": "a", "name": 3}],
)  # fmt: skip
HEADERS = {"Content-Type": "application/json"}


def mutated(seed: int) -> tuple[str, bytes, bool]:
    """A path, a body, and whether its user hangs up early."""
    rng = Random(seed)
    path = rng.choice(sorted(RIGHT))
    body = deepcopy(RIGHT[path])
    if rng.random() < 0.3:
        body["stream"] = True
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        how = rng.random()
        if how < 0.15:
            body.pop(rng.choice(sorted(body)), None) if body else None
        elif how < 0.3 and isinstance(body.get("messages"), list) and body["messages"]:
            turn = rng.choice(body["messages"])
            if isinstance(turn, dict):
                turn[rng.choice(("role", "content", "name", "tool_calls", "odd"))] = deepcopy(rng.choice(ODD))
        else:
            body[rng.choice(FIELDS)] = deepcopy(rng.choice(ODD))
    sent = json.dumps(body).encode()
    if rng.random() < 0.15:
        at = rng.randrange(len(sent))
        changed = sent[:at] + bytes([rng.randrange(256)]) + sent[at + 1 :]
        sent = rng.choice((sent[:at], changed, sent + sent, b"\xff" + sent))
    return path, sent, bool(body.get("stream")) and rng.random() < 0.5


def ask(client: httpx.Client, seed: int) -> int:
    """Its status; 499 where it hung up, and 599 where there was no answer in time."""
    path, body, hangs_up = mutated(seed)
    try:
        with client.stream("POST", path, content=body, headers=HEADERS) as answer:
            if hangs_up:
                return answer.status_code if answer.status_code >= 500 else 499
            text = answer.read()
            broken = answer.status_code == 200 and b'"code":500' in text.replace(b" ", b"")
            return 500 if broken else answer.status_code
    except httpx.TimeoutException:
        return 599


def ask_many(url: str, count: int, key: str | None = None, threads: int = 8, first: int = 0) -> Counter[int]:
    """How often which status came. Those of 500 and more are printed with their seeds, which ask the same again."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=url, headers=headers, timeout=120) as client, ThreadPoolExecutor(threads) as pool:
        seeds = range(first, first + count)
        for seed, status in zip(seeds, pool.map(lambda seed: ask(client, seed), seeds), strict=True):
            statuses[status] += 1
            if status >= 500:
                print(f"{status}: seed {seed}: {mutated(seed)}")
    return statuses


def main() -> None:
    """Ask, and say what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    started = time.monotonic()
    statuses = ask_many(options.url, options.count, os.environ.get("OPENAI_API_KEY"), options.threads, options.first)
    print(dict(sorted(statuses.items())), f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
