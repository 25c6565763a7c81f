"""The pool of generators against what it is made of: vLLM alone, engines that answer at once, versions that arrive.

    python benchmarks/pool.py [--only sampling records versions] [--size 5M|135M|1.5B] [--device cpu|cuda] [--rounds 3]

1. Tokens/s: the same prompts, seeds and engine settings through bare `vllm.LLM.generate`, and through a generator actor
   asked by the pool whose parts go through a channel to a consumer in another process. Both give texts; both engines
   stay loaded and take turns, and the ratio is of each pair of turns.
2. Records/s: PLE's own stages (draw, ask, score, commit as Parquet, channel) over 1 to 32 engines that answer at once,
   with a reward that costs nothing. A record is a row of a part: one prompt, two answers.
3. Seconds from the publication of a version until the engine has proved it, for adapters and for whole weights.

Models have random weights: in float32 on a CPU, in bfloat16 on a GPU, which both engines of 1 share. Figures are means,
medians where they say so; nothing is asserted.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from small_model import make_model, make_shape
from worlds import table

from actors.channel import Box
from actors.cluster import start_ray, stop_ray
from actors.engines.seam import EngineSpec
from actors.learning.policy import LearnedPolicy
from actors.proof import TOLERANCE
from actors.scorer import ScorerSpec
from actors.spawn import Fleet, ask, gather, start_fleet
from pipelines.context import Context, EventLog
from pipelines.loop import Progress, produce, prove_everywhere
from pipelines.ple import PleMethod
from pipelines.pool import Pool
from plumbline.config.data import Model
from plumbline.config.file import parse_config
from plumbline.config.fleet import GeneratorFleet, ScorerFleet
from plumbline.config.pipelines import Ple
from plumbline.config.section import planned
from plumbline.data.dataset import read_prompts
from plumbline.data.ending import encode_response
from plumbline.data.length_filter import Fit
from plumbline.data.prompting import render
from plumbline.data.tokenizer import load_tokenizer
from plumbline.miniature.language import TARGET, sample_answer, sample_request
from plumbline.miniature.tokenizer import make_tokenizer
from plumbline.models.ipc import Shelf
from plumbline.records import Completion, GenerateRequest, Generation, PolicyRef, Publication, Sampling, TokenGroup
from plumbline.runs.policies import read_publication, version_directory
from plumbline.runs.rows import Rows

PROMPTS, MAX_TOKENS = {"cpu": 256, "cuda": 2048}, {"cpu": 64, "cuda": 128}
RECORDS, PART = 6144, 128
ENGINES = (1, 2, 4, 8, 16, 32)
REWARD = "benchmarks.worlds:no_reward"
VERSIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured, and where; `out` is for what it writes."""

    out: Path
    size: str
    device: Literal["cpu", "cuda"]
    rounds: int

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def settings(self) -> GeneratorFleet:
        """Of one generator; another engine has room beside it on the same card."""
        gpu = self.device == "cuda"
        return GeneratorFleet(
            replicas=1, cpus=1, gpus=0.4 if gpu else 0, max_num_seqs=256 if gpu else 64, memory_share=0.4
        )

    @property
    def max_tokens(self) -> int:
        return MAX_TOKENS[self.device]


def engine_spec(setup: Setup, model: Path, adapters: int = 4) -> EngineSpec:
    settings = setup.settings
    return EngineSpec(
        model_path=str(model),
        dtype=setup.dtype,
        device=setup.device,
        max_model_len=256,
        max_num_seqs=settings.max_num_seqs,
        max_lora_rank=8,
        max_adapters=adapters,
        threads=planned(settings.cpus),
        kv_cache_gib=settings.kv_cache_gib,
        memory_share=planned(settings.memory_share),
        seed=0,
    )


def make_world(setup: Setup) -> Path:
    """A model with random weights and the miniature world's words, and prompts of that world."""
    out = setup.out
    directory = out / f"model-{setup.size}-{setup.dtype}"
    if not directory.exists():
        torch.manual_seed(0)
        model: Any = make_model(tied=False) if setup.size == "5M" else make_shape(setup.size)
        model.to(getattr(torch, setup.dtype)).save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
    rng = random.Random(0)
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for i in range(RECORDS):
            request = sample_request(rng, harmful=False)
            row = {"id": f"p{i}", "prompt": request.render(), "target": sample_answer(request, TARGET, rng)}
            file.write(json.dumps(row) + "\n")
    return directory


# 1. Tokens/s


class Bare:
    """`vllm.LLM` in a process of its own, with the settings of `actors.engines.vllm`."""

    llm: Any = None

    @classmethod
    def generate(cls, spec: EngineSpec, requests: Sequence[GenerateRequest]) -> tuple[float, list[list[int]]]:
        """Seconds, and the sampled ids of every request."""
        if spec.device == "cpu":
            os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            torch.set_num_threads(spec.threads)
        from vllm import LLM, SamplingParams, TokensPrompt

        from actors.engines.vllm import adapter_settings

        if cls.llm is None:
            settings: dict[str, Any] = adapter_settings(spec)
            if spec.device == "cpu":
                settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "enforce_eager": True}
                settings["kv_cache_memory_bytes"] = int(spec.kv_cache_gib * 2**30)
            else:
                settings["gpu_memory_utilization"] = spec.memory_share
            cls.llm = LLM(
                model=spec.model_path,
                dtype=spec.dtype,
                seed=spec.seed,
                max_model_len=spec.max_model_len,
                max_num_seqs=spec.max_num_seqs,
                disable_log_stats=True,
                **settings,
            )
        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        params = [SamplingParams(max_tokens=r.sampling.max_tokens, seed=r.seed, temperature=1.0) for r in requests]
        started = time.perf_counter()
        outputs = cls.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started, [list(output.outputs[0].token_ids) for output in outputs]


class Consumer:
    """The other end of a channel: leases parts, reads and acknowledges them, and gives their slots back."""

    def run(self, channel: Any) -> int:
        """Until the channel closes; returns how many records there were."""
        records = 0
        ray.get(channel.attach.remote("consumer", 0))
        while True:
            lease: Any = ray.get(channel.lease.remote("consumer"))
            if lease is None:
                return records
            records += len(ray.get(lease.box.ref))
            ray.get([channel.ack.remote(lease.step, "consumer"), channel.release.remote()])


def actor(kind: Any) -> Any:
    """One of its own process, which takes no CPU from the others' count."""
    return ray.remote(kind).options(num_cpus=0).remote()


async def through_pool(
    fleet: Fleet, pool: Pool, requests: Sequence[GenerateRequest], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Seconds until the consumer has all, in parts of `PART` requests, and the sampled ids."""
    channel, consumer = fleet.add_channel(4, "bench"), actor(Consumer)
    consumed = consumer.run.remote(channel)
    await ask(channel.depth.remote())
    drawn: list[Generation] = []
    started = time.perf_counter()

    async def part(step: int, asked: Sequence[GenerateRequest]) -> None:
        await ask(channel.reserve.remote())
        batches = [asked[i : i + pool.batch] for i in range(0, len(asked), pool.batch)]
        tokens = pool.batch * max_tokens
        answered = await gather(
            *(pool.ask("bench", pool.batch, tokens, lambda g, b=b: ask(g.generate.remote(list(b)))) for b in batches)
        )
        flat = [generation for one in answered for generation in one]
        drawn.extend(flat)
        await ask(channel.put.remote(step, Box(ref=ray.put(flat))))

    await gather(*(part(i // PART + 1, requests[i : i + PART]) for i in range(0, len(requests), PART)))
    await ask(channel.close.remote())
    assert await ask(consumed) == len(requests)
    seconds = time.perf_counter() - started
    ids = {one.key: one.completions[0].ids for one in drawn}
    return seconds, [ids[request.key] for request in requests]


async def sampling(setup: Setup) -> None:
    model = make_world(setup)
    tokenizer, spec = load_tokenizer(str(model)), engine_spec(setup, model)
    prompts = read_prompts(str(setup.out / "prompts.jsonl"))[: PROMPTS[setup.device]]
    asked = [
        GenerateRequest(
            key=prompt.id,
            prompt_ids=render(tokenizer, prompt.messages),
            ref=PolicyRef(),
            sampling=Sampling(max_tokens=setup.max_tokens),
            seed=i,
        )
        for i, prompt in enumerate(prompts)
    ]
    fleet = start_fleet(keep=4)
    fleet.add_generators(setup.settings, "vllm", spec, [], 1.0, keep=2)
    await fleet.ready()
    pool = Pool(fleet.generators, spec.in_flight, batch=spec.batch)
    rows, ratios, same = [], [], True
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)  # read once, where the other process begins
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:

        async def bare(requests: Sequence[GenerateRequest]) -> tuple[float, list[list[int]]]:
            return await asyncio.get_running_loop().run_in_executor(apart, Bare.generate, spec, requests)

        for number in range(setup.rounds + 1):  # the first compiles and fills caches
            requests = [replace(request, seed=request.seed + 1000 * number) for request in asked]
            seconds, expected = await bare(requests)
            ours, found = await through_pool(fleet, pool, requests, setup.max_tokens)
            tokens, sampled = sum(map(len, expected)), sum(map(len, found))
            if number:
                same = same and expected == found
                ratios.append(sampled / ours / (tokens / seconds))
                rows.append([str(number), f"{tokens / seconds:.0f}", f"{sampled / ours:.0f}", f"{ratios[-1]:.3f}×"])
    fleet.close()
    rows.append(["median", "", "", f"{statistics.median(ratios):.3f}×"])
    print(table(["turn", "bare `LLM.generate`, tokens/s", "actor, pool and channel, tokens/s", "ratio"], rows))
    print(
        f"\n{setup.size}, {setup.device} {setup.dtype}, {len(prompts)} prompts, at most {setup.max_tokens} tokens each,"
    )
    print(f"{spec.max_num_seqs} at a time;")
    print(f"the same tokens were sampled: {'yes' if same else 'no, batches differ in their rounding'}\n")


# 2. Records/s


class Instant:
    """A generator whose answers cost nothing: two of 24 tokens, unlike each other."""

    def __init__(self) -> None:
        self._answers = {
            kind: (Completion(text=f"The {kind} goat eats grass.", ids=[i, *range(3, 26)], finish_reason="stop"),)
            for i, kind in enumerate(("plain", "guided"))
        }

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        return [
            Generation(key=r.key, ref=r.ref, engine="instant", completions=self._answers[r.key.rpartition("/")[2]])
            for r in requests
        ]


async def records(setup: Setup) -> None:
    model = make_world(setup)
    turns = [[await records_per_s(setup, model, engines) for engines in ENGINES] for _ in range(setup.rounds)]
    rows = []
    for engines, rates in zip(ENGINES, zip(*turns, strict=True), strict=True):
        ratio = statistics.median(rate / turn[0] for rate, turn in zip(rates, turns, strict=True))
        span = f"{min(rates):.0f} to {max(rates):.0f}"
        rows.append([str(engines), f"{statistics.median(rates):.0f}", span, f"{ratio:.2f}×"])
    print(table(["engines", "records/s, median", f"of {setup.rounds}", "against one engine in the same turn"], rows))
    print(f"\n{RECORDS} records in parts of {PART}; 2 answers of 24 tokens each\n")


async def records_per_s(setup: Setup, model: Path, engines: int) -> float:
    out, directory = setup.out, setup.out / "records"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = parse_config(
        {
            "name": "records",
            "model": {"path": str(model), "max_len": 256},
            "data": {"train": {"path": str(out / "prompts.jsonl")}},
            "reward": {"type": "program", "function": REWARD},
            "pipelines": [
                {"type": "ple", "batch_size": PART, "max_staleness": 7, "generation": {"max_tokens": 24}},
            ],
        },
        origin="benchmark",
    )
    [section] = config.methods
    assert isinstance(section, Ple)
    fleet = start_fleet(keep=4)
    prompts = read_prompts(str(out / "prompts.jsonl"))
    context = Context(
        config=config,
        run_dir=directory,
        device="cpu",
        dtype="float32",
        tokenizer=load_tokenizer(str(model)),
        rows=Rows(prompts=prompts, fits={section.name: Fit(prompts=prompts, unfit=[])}),
        events=EventLog(directory / "events.jsonl", lambda event: None),
        fleet=fleet,
    )
    fleet.rewards["reward"] = fleet.add_scorers(ScorerFleet(gpus=0), ScorerSpec(function=REWARD))
    instant = [actor(Instant) for _ in range(engines)]
    await gather(
        *(one.generate.remote([]) for one in instant), *(one.ready.remote() for one in fleet.rewards["reward"])
    )
    spec = replace(engine_spec(setup, model), max_num_seqs=GeneratorFleet().max_num_seqs)
    context.pool = Pool(instant, capacity=spec.in_flight, batch=spec.batch)
    method = PleMethod(context, section)
    channel, consumer = fleet.add_channel(method.slots, "bench"), actor(Consumer)
    consumed = consumer.run.remote(channel)
    await ask(channel.depth.remote())
    started = time.perf_counter()
    await produce(context, method, channel, Progress(resumed=0, logged=0, proved=0, undrawn=method.part_count))
    count = await ask(consumed)
    seconds = time.perf_counter() - started
    assert count == RECORDS == len(method.parts.read_all())
    for one in (*instant, consumer):
        ray.kill(one)
    fleet.close()
    return count / seconds


# 3. Versions


async def versions(setup: Setup) -> None:
    model, out = make_world(setup), setup.out
    rows = []
    for kind in ("lora", "full"):
        seconds = await seconds_to_prove(setup, out / f"versions-{kind}", model, kind)
        size = sum(f.stat().st_size for f in sorted((out / f"versions-{kind}").rglob("*.safetensors"))[-1:]) / 2**20
        first, rest = seconds[0], seconds[1:]
        rows.append([kind, f"{size:.1f}", f"{first:.3f}", f"{statistics.median(rest):.3f}", f"{max(rest):.3f}"])
    print(table(["weights", "MiB", "the first, s", "median of the others, s", "longest, s"], rows))
    print(f"\n{setup.size}, {setup.device} {setup.dtype}: {VERSIONS} versions one after the other on an engine without")
    print("other work; the proof is of 16 prompts\n")


async def seconds_to_prove(setup: Setup, directory: Path, model: Path, kind: str) -> list[float]:
    """From the call of `publish`, the version being in memory, until the engine has loaded and proved it."""
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = load_tokenizer(str(model))
    prompts = read_prompts(str(directory.parent / "prompts.jsonl"))[:16]
    probe = [
        TokenGroup(render(tokenizer, p.messages), [encode_response(tokenizer, p.target or "")[:60]]) for p in prompts
    ]
    section = Ple.model_validate({"type": "ple", "policy": {"type": kind}})
    policy = LearnedPolicy(section, Model.model_validate({"path": str(model)}), setup.dtype, setup.device, 0)
    base = previous = policy.probe(probe)
    shelf = Shelf(torch.device("cuda", 0)) if kind == "full" and setup.device == "cuda" else None
    fleet = start_fleet(keep=VERSIONS)
    spec = engine_spec(setup, model, adapters=4 if kind == "lora" else 0)
    fleet.add_generators(setup.settings, "vllm", spec, probe, TOLERANCE[setup.dtype], keep=2)
    await fleet.ready()
    pool = Pool(fleet.generators, 1, batch=1)
    context: Any = argparse.Namespace(fleet=fleet, pool=pool)  # all that `prove_everywhere` reads
    seconds = []
    for number in range(1, VERSIONS + 1):
        with torch.no_grad():
            for parameter in policy.trainable:
                parameter.add_(torch.randn_like(parameter), alpha=0.005)
        now, ref = policy.probe(probe), PolicyRef(policy="ple", version=number)
        publication = Publication(
            ref=ref, files={}, probe_logps=now, previous_probe_logps=previous, base_probe_logps=base
        )
        policy.save(version_directory(directory, ref), publication, adapter=kind == "lora")
        publication, previous = read_publication(directory, ref), now
        if shelf:  # as a learner that shares the engine's card
            publication = replace(publication, shared=shelf.lay(policy.model.named_parameters()))
        started = time.perf_counter()
        await ask(fleet.store.publish.remote(publication))
        assert await prove_everywhere(context, ref)
        seconds.append(time.perf_counter() - started)
    fleet.close()
    return seconds


PARTS: dict[str, Callable[[Setup], Coroutine[Any, Any, None]]] = {
    "sampling": sampling,
    "records": records,
    "versions": versions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=("5M", "135M", "1.5B"), default="5M", help="of the model; random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/pool"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    setup = Setup(out=options.out.absolute(), size=options.size, device=options.device, rounds=options.rounds)
    setup.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        start_ray(cpus=2)
        asyncio.run(PARTS[name](setup))
        stop_ray()


if __name__ == "__main__":
    main()
