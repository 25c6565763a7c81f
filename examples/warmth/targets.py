"""Self-Contrast's targets where there are none: of four answers that π0 gives to the principle, the best by the reward.

    python -m examples.warmth.targets [--set model.dtype=float32]

Runs `examples/warmth/targets.yaml` on the prompts with the principle of `configs/quickstart-llm.yaml` before each, and
writes `runs/warmth/train.jsonl`, in which the principle is gone. What is there already is not made
again. Arguments go to `plumbline run`.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from plumbline.config.file import load_config
from plumbline.runs.parts import Parts

HERE = Path(__file__).parent
WORK = Path("runs/warmth")


def main() -> None:
    train = WORK / "train.jsonl"
    if train.exists():
        return
    [principle] = [one.principle for one in load_config("configs/quickstart-llm.yaml").pipelines if one.type == "ple"]
    prompts = [json.loads(line)["prompt"] for line in (HERE / "prompts_train.jsonl").read_text("utf-8").splitlines()]
    system = {"role": "system", "content": principle}
    write(WORK / "guided.jsonl", ({"messages": [system, {"role": "user", "content": one}]} for one in prompts))
    command = [sys.executable, "-m", "cli", "run", str(HERE / "targets.yaml"), "--run-dir", str(WORK / "targets")]
    if code := subprocess.run([*command, *sys.argv[1:]]).returncode:
        sys.exit(code)
    best = Parts(str(WORK / "targets" / "rollouts" / "raft"), read_only=True).read_all()
    asked = [json.loads(str(row["prompt"]))[-1]["content"] for row in best]  # kept as the whole conversation
    write(train, ({"prompt": prompt, "target": row["answer"]} for prompt, row in zip(asked, best, strict=True)))


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """A JSON Lines file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    aside.replace(path)


if __name__ == "__main__":
    main()
