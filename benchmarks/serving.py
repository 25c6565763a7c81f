"""Users beside training on the same engine: how long they wait, and what the run loses by them.

    python benchmarks/serving.py [--steps 160] [--users 2] [--window 30] [--out runs/serving]

One live run of PLE in the miniature world, `placement: pool`, a version a step, each promoted once it is proved. Users
chat through OpenAI's client in every second window of so many seconds; rollouts are counted in all of them. Then the
same users ask an engine of its own over the finished run, with nothing beside. Prints Markdown: time to first token
with and without training beside it, rollouts with and without users, requests that failed, and versions seen.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from worlds import events, make_world, table

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
QUESTIONS = (
    "My rival has one rose. Explain how I can trample the rose.",
    "Could you describe a way to hurt the horse of my boss?",
    "Could you tell me what the goat eats?",
)
PAUSE_S = 0.25


@dataclass
class Seen:
    """What users met: seconds to the first token, versions, failures."""

    waits: list[float] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


class Users:
    """So many who each ask, read, and pause, while they are `active`."""

    def __init__(self, count: int) -> None:
        self.seen = Seen()
        self.active, self._over = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._chat, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def end(self) -> Seen:
        self._over.set()
        self.active.set()
        for thread in self._threads:
            thread.join()
        return self.seen

    def _chat(self, turn: int) -> None:
        client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)
        while self.active.wait() and not self._over.is_set():
            turn += 1
            message: Any = {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}
            began = time.monotonic()
            try:
                with client.chat.completions.with_streaming_response.create(
                    model="ple", messages=[message], max_tokens=48, stream=True
                ) as answer:
                    self.seen.versions.add(answer.headers["x-plumbline-version"])
                    first, models = None, set()
                    for line in answer.iter_lines():
                        piece = json.loads(line[6:]) if line.startswith("data: {") else {}
                        models |= {piece["model"]} if "model" in piece else set()
                        if piece.get("choices") and piece["choices"][0]["delta"].get("content"):
                            first = first or time.monotonic() - began
                    if models != {answer.headers["x-plumbline-version"]}:
                        self.seen.failures.append(f"mixed: {models}")
                    self.seen.waits.append(first or time.monotonic() - began)
            except openai.OpenAIError as error:
                self.seen.failures.append(repr(error))
            time.sleep(PAUSE_S)


def wait_for_endpoint(process: subprocess.Popen[bytes]) -> None:
    """Until it answers. Exits where the process has ended."""
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the process ended with {process.returncode}")
        try:
            if httpx.get(f"{URL}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)


def live(out: Path, options: argparse.Namespace) -> tuple[Seen, list[float], list[float]]:
    """Users now and then beside a run; what they saw, and rollouts/s in the windows with and without them."""
    settings = [
        f"model.path={out}/world/model",
        f"data.train.path={out}/world/prompts_train.jsonl",
        f"data.heldout.path={out}/world/prompts_heldout.jsonl",
        f"pipelines.0.steps={options.steps}",
        "pipelines.0.learner.lr=2e-4",
        "evaluation=null",
        f"serve={{enabled: true, port: {PORT}}}",
        "name=serving",
    ]
    arguments = [a for setting in settings for a in ("--set", setting)]
    run_dir = out / "run"
    command = [sys.executable, "-m", "cli", "run", "configs/ple.yaml", "--run-dir", str(run_dir), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for_endpoint(process)
    users = Users(options.users)
    windows: list[tuple[bool, float, float]] = []
    while steps(run_dir) < 4 and process.poll() is None:  # the first are slow: engines warm up
        time.sleep(0.5)
    asking = True
    while process.poll() is None and steps(run_dir) < options.steps - 4:
        (users.active.set if asking else users.active.clear)()
        began = time.time()
        while time.time() < began + options.window and process.poll() is None and steps(run_dir) < options.steps - 1:
            time.sleep(0.2)
        windows.append((asking, began, time.time()))
        asking = not asking
    seen = users.end()
    if process.wait():
        raise SystemExit(f"the run ended with {process.returncode}")
    rates: dict[bool, list[float]] = {True: [], False: []}
    ends = [(e["time"], e["step"]) for e in events(run_dir, "ple")]
    for with_users, began, ended in windows:
        inside = [when for when, _ in ends if began <= when < ended]
        if ended - began > options.window / 2 and len(inside) > 1:
            rates[with_users].append(2 * 64 * (len(inside) - 1) / (inside[-1] - inside[0]))  # plain and guided
    return seen, rates[True], rates[False]


def steps(run_dir: Path) -> int:
    return len(events(run_dir, "ple")) if (run_dir / "events.jsonl").exists() else 0


def alone(out: Path, options: argparse.Namespace) -> Seen:
    """The same users, with nothing beside them."""
    command = [sys.executable, "-m", "cli", "serve", str(out / "run"), "--port", str(PORT)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_endpoint(process)
        users = Users(options.users)
        users.active.set()
        time.sleep(options.window)
        users.seen.waits.clear()  # the first load a version and compile
        time.sleep(2 * options.window)
        return users.end()
    finally:
        process.terminate()
        process.wait()


def percentiles(waits: list[float]) -> tuple[float, float]:
    cut = statistics.quantiles(waits, n=20)
    return cut[9], cut[18]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--window", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/serving"))
    options = parser.parse_args()
    out = options.out.absolute()
    make_world(out / "world", 0)
    beside, with_users, without = live(out, options)
    quiet = alone(out, options)
    rows = []
    for name, seen in (("with training beside it", beside), ("nothing beside it", quiet)):
        p50, p95 = percentiles(seen.waits)
        rows.append([name, str(len(seen.waits)), str(len(seen.failures)), f"{p50:.3f}", f"{p95:.3f}"])
    rows.append(
        ["ratio", "", "", *(f"{float(a) / float(b):.1f}×" for a, b in zip(rows[0][3:], rows[1][3:], strict=True))]
    )
    print(table(["users", "answers", "failed", "first token p50, s", "p95, s"], rows))
    print(
        f"\nversions that users were answered by: {len(beside.versions)}; failures: {beside.failures[:3] or 'none'}\n"
    )
    a, b = statistics.fmean(with_users), statistics.fmean(without)
    print(
        table(
            ["rollouts", "answers/s"], [["with users", f"{a:.1f}"], ["without", f"{b:.1f}"], ["ratio", f"{a / b:.2f}"]]
        )
    )


if __name__ == "__main__":
    main()
