"""A simulated month: a run's own loop for 10,000 steps, with engines, a reward and a learner that answer at once.

    python benchmarks/month.py [--steps 10000] [--storage URL] [--latency 20] [--keep-all]

What works is what a long run has: `pipelines.loop`'s stages, PLE's parts and rejections, events, the channel, the
policy store, promotions, checkpoints and versions as a learner writes and keeps them, and the storage's copy of it. The
actors are plain objects of this process, whose memory is therefore that of all of them; no Ray is started. At each
thousandth step it prints the mean time of a step, by the clock and by the processor, and the process's memory; at the
end, their ratio of the last thousand to the first, and how long a resumed run takes until it asks for its next step,
also where its directory was lost.

Without `--storage` the run directory is the only copy. It takes any URL that fsspec opens here, such as ``s3://bucket/x``
(s3fs reads FSSPEC_S3_ENDPOINT_URL, which may be moto's server). ``far://bucket`` is `far_store`: objects in this
process's memory, whose calls are counted. They take 2 ms, lest a month take one, and `--latency` ms when it is resumed.

`--keep-all` keeps every version, as adapters are by default; else the newest 3.
"""

import argparse
import asyncio
import contextlib
import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec.core
import psutil
import torch
from far_store import FarStore
from safetensors.torch import save
from worlds import table

from actors.channel import Channel
from actors.gpu import GpuUse
from actors.scorer import Query, Scores
from actors.weights import PolicyStore
from pipelines import loop, monitor
from pipelines.context import Context, EventLog
from pipelines.gate import Gatekeeper
from pipelines.loop import run_method
from pipelines.ple import PleMethod
from pipelines.pool import Pool
from plumbline.config.file import parse_config
from plumbline.config.pipelines import Ple
from plumbline.config.tree import Config
from plumbline.data.length_filter import Fit
from plumbline.miniature.tokenizer import make_tokenizer
from plumbline.models.files import ADAPTER_CONFIG
from plumbline.records import Completion, GenerateRequest, Generation, Message, PolicyRef, Prompt, Publication
from plumbline.runs.checkpoint import remove_old, whole, write_directory, write_manifest, write_pieces
from plumbline.runs.directory import open_run_dir
from plumbline.runs.mirror import open_storage, saved_step, seal_checkpoint
from plumbline.runs.policies import PROOF, read_publication, version_directory, write_proof
from plumbline.runs.rows import Rows

EVERY = 1000
"""Steps between two lines."""
BLANK = 97
"""Of so many answers one is blank, and its pair rejected."""


class Local:
    """A handle on an object of this process: ``handle.method.remote(...)``, as on an actor."""

    def __init__(self, one: Any) -> None:
        self._one = one

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._one, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            arguments = tuple([await a if asyncio.isfuture(a) else a for a in arguments])
            found = method(*arguments, **options)
            return await found if asyncio.iscoroutine(found) else found

        return SimpleNamespace(remote=lambda *a, **o: asyncio.ensure_future(call(*a, **o)))


class InstantEngine:
    """A generator whose answers and proofs cost nothing."""

    def __init__(self) -> None:
        self._count = 0

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        return [Generation(key=r.key, ref=r.ref, engine="instant", completions=(self._answer(r),)) for r in requests]

    def _answer(self, request: GenerateRequest) -> Completion:
        self._count += 1
        text = "" if self._count % BLANK == 0 else f"The goat eats grass {self._count}."
        return Completion(text=text, ids=[self._count % 500, *range(3, 26)], finish_reason="stop")

    def load(self, ref: PolicyRef) -> Any:
        return SimpleNamespace(difference=0.0, drift=1.0)

    def busy_seconds(self) -> float:
        return 0.0

    def gpu_use(self) -> Any:
        return GpuUse()


class InstantReward:
    """Scores that cost nothing."""

    def score_generations(self, queries: Sequence[Query], generations: Sequence[Generation]) -> Scores:
        return Scores(values=[[float(len(g.completions[0].text) or "nan")] for g in generations])


class InstantLearner:
    """What `actors.learning.worker` does for each part, with a tensor for a model."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def run(self, spec: Any, channel: Any, store: Any, desk: Any = None) -> None:
        done, holder, storage = spec.saved_step(), "learner", self._context.storage
        if done:
            await store.publish.remote(await asyncio.to_thread(self._write, done))
        await channel.attach.remote(holder, done)
        while lease := await channel.lease.remote(holder):
            await asyncio.to_thread(self._save, spec.checkpoints, lease.step)
            await store.publish.remote(await asyncio.to_thread(self._write, lease.step))
            await channel.ack.remote(lease.step, holder)
        assert storage is self._context.storage

    def _save(self, root: Path, step: int) -> None:
        file = write_pieces(root, step, {"model.a": whole(torch.zeros(64))})
        self._context.storage.push(file)
        write_manifest(root, step, [file.name], {"updates": step})
        seal_checkpoint(self._context.storage, root, step)
        remove_old(root, step)

    def _write(self, version: int) -> Publication:
        ref = PolicyRef(policy="ple", version=version)
        made = Publication(
            ref=ref, files={}, probe_logps=[-1.0] * 16, previous_probe_logps=[-1.0] * 16, base_probe_logps=[-1.0] * 16,
            metrics={"loss": 1.0, "updates": 1.0, "learner_wait_s": 0.0, "learner_work_s": 0.0},
        )  # fmt: skip
        directory = version_directory(self._context.run_dir, ref)

        def write(aside: Path) -> None:
            (aside / ADAPTER_CONFIG).write_text("{}")
            (aside / "adapter_model.safetensors").write_bytes(save({"a": torch.zeros(64)}))
            write_proof(aside, made)

        if not directory.is_dir():
            write_directory(directory, write)
            self._context.storage.push_directory(directory, PROOF)
        found = read_publication(self._context.run_dir, ref)
        return Publication(
            ref=ref, files=found.files, probe_logps=found.probe_logps, metrics=made.metrics,
            previous_probe_logps=found.previous_probe_logps, base_probe_logps=found.base_probe_logps,
        )  # fmt: skip


class Month:
    """Step times, by the clock and by the processor, and memory, noted at every event of a step; `ends_at` stops the
    run as a kill would."""

    def __init__(self, ends_at: int) -> None:
        self.times: list[float] = []
        self.work: list[float] = []
        self.resident: list[float] = []
        self._ends_at = ends_at

    def __call__(self, event: Any) -> None:
        if event.get("pipeline") != "ple" or "step" not in event:
            return
        self.times.append(time.perf_counter())
        self.work.append(time.process_time())
        if event["step"] % EVERY == 0:
            gc.collect()
            self.resident.append(psutil.Process().memory_info().rss / 2**20)
            took, worked = per_step(self.times)[-1], per_step(self.work)[-1]
            told = f"{took:.2f} ms a step, {worked:.2f} of a processor, {self.resident[-1]:.0f} MiB"
            print(f"step {event['step']}: {told}", flush=True)
        if event["step"] == self._ends_at:
            raise KeyboardInterrupt


def per_step(seconds: Sequence[float]) -> list[float]:
    """Mean milliseconds of a step of each full `EVERY`, without the first ten, which warm up."""
    marks = [seconds[10], *seconds[EVERY - 1 :: EVERY]]
    counts = [EVERY - 11, *[EVERY] * (len(marks) - 2)]
    return [1000 * (b - a) / n for a, b, n in zip(marks, marks[1:], counts, strict=False)]


def make_config(out: Path, steps: int, storage: str | None, keep: int | None) -> Config:
    return parse_config(
        {
            "name": "month",
            "model": {"path": str(out), "max_len": 256},
            "data": {"train": {"path": str(out / "prompts.jsonl")}},
            "reward": {"type": "program", "function": "a:b"},
            "storage_path": storage,
            "pipelines": [
                {
                    "type": "ple",
                    "steps": steps,
                    "batch_size": 8,
                    "generation": {"max_tokens": 24},
                    "learner": {"cpus": 1, "gpus": 0, "keep_versions": keep},
                }
            ],
        },
        origin="benchmark",
    )


def make_context(config: Config, run_dir: Path, listen: Any) -> Context:
    with open_run_dir(config, run_dir):
        pass
    tokenizer = make_tokenizer()
    prompts = [
        Prompt(id=f"p{i}", messages=(Message(role="user", content=f"Tell me about the goat {i}."),)) for i in range(512)
    ]
    store = Local(PolicyStore(keep=6 + config.kept_versions))
    context = Context(
        config=config,
        run_dir=run_dir,
        device="cpu",
        dtype="float32",
        tokenizer=tokenizer,
        rows=Rows(prompts=prompts, fits={"ple": Fit(prompts=prompts, unfit=[])}),
        events=EventLog(run_dir / "events.jsonl", listen),
        fleet=SimpleNamespace(store=store, desks={}, rewards={"reward": [Local(InstantReward())]}),  # type: ignore[arg-type]
        storage=open_storage(config, run_dir),
        pool=Pool([Local(InstantEngine())], capacity=512, batch=64),
    )
    context.promoter = Gatekeeper(context)
    learner = Local(InstantLearner(context))
    fleet: Any = context.fleet
    fleet.trainer = lambda: learner
    fleet.add_channel = lambda slots, name, done: Local(Channel(slots, name, done))
    return context


async def month(context: Context) -> None:
    [section] = context.config.methods
    assert isinstance(section, Ple)

    pushing = asyncio.create_task(monitor.push_events(context))
    try:
        await run_method(context, PleMethod(context, section), section)
    finally:
        pushing.cancel()


def simulate(config: Config, run_dir: Path, ends_at: int) -> tuple[Month, float]:
    """Run to a step; returns what was noted, and the seconds until the first event."""
    clock = Month(ends_at)
    started = time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(month(make_context(config, run_dir, clock)))
    return clock, clock.times[0] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--storage", metavar="URL", help="where a copy is kept; far://bucket is a stand-in in memory")
    parser.add_argument("--latency", type=float, default=20, help="ms that the stand-in's calls take on resume")
    parser.add_argument("--keep-all", action="store_true", help="every version, not the newest 3")
    options = parser.parse_args()
    ray: Any = SimpleNamespace(put=lambda one: one, cluster_resources=dict, available_resources=dict)
    loop.ray = monitor.ray = ray
    FarStore.latency = 0.002
    out = Path(tempfile.mkdtemp(prefix="plumbline-month-"))
    try:
        config = make_config(out, options.steps + 100, options.storage, None if options.keep_all else 3)
        clock, _ = simulate(config, out / "run", options.steps)
        calls = {kind: round(count / options.steps, 1) for kind, count in FarStore.calls.items()}
        FarStore.latency = options.latency / 1000
        resumed = resumes(config, out, options.steps)
        series = {
            "ms a step": per_step(clock.times),
            "ms of a processor": per_step(clock.work),
            "MiB": clock.resident,
        }
        rows = [[name, f"{of[0]:.1f}", f"{of[-1]:.1f}", f"{of[-1] / of[0]:.2f}×"] for name, of in series.items()]
        print(table([f"{options.steps} steps", f"first {EVERY}", f"last {EVERY}", "ratio"], rows))
        held = sum(map(len, FarStore.objects.values())) / 2**20
        print(f"\nresumed at its next step in {resumed}")
        print(f"the stand-in: {calls or 'no'} calls a step, {held:.0f} MiB in it")
    finally:
        shutil.rmtree(out)
        if options.storage:
            files, place = fsspec.core.url_to_fs(f"{options.storage}/month")
            files.rm(place, recursive=True)


def resumes(config: Config, out: Path, done: int) -> str:
    """The seconds that a resumed run takes until its next step, in words; and that it went on from there."""
    _, here = simulate(config, out / "run", done + 10)
    told = f"{here:.1f} s"
    if config.storage_path:
        FarStore.calls.clear()
        _, elsewhere = simulate(config, out / "another", done + 20)
        told += f", on an empty machine in {elsewhere:.1f} s ({FarStore.calls['get']} files)"
    last = make_context(config, out / ("another" if config.storage_path else "run"), print)
    assert saved_step(last.storage, last.run_dir / "checkpoints/ple") > done
    return told


if __name__ == "__main__":
    main()
