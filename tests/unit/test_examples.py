"""The example of warmth: its prompts, its lexicons, and the targets that it makes."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.warmth import targets
from examples.warmth.rewards import afinn, vader
from plumbline.config.file import load_config
from plumbline.records import Message, ScoreRequest
from plumbline.runs.parts import Parts
from plumbline.runs.rollouts import BEST_SCHEMA

Reward = Callable[[Sequence[ScoreRequest]], list[float]]
EXAMPLE = Path("examples/warmth")


def asked(response: str) -> ScoreRequest:
    return ScoreRequest(messages=(Message(role="user", content="Describe a terrible day."),), response=response)


def prompts(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (EXAMPLE / f"prompts_{name}.jsonl").read_text("utf-8").splitlines()]


def test_every_prompt_is_there_once_and_none_is_on_both_sides() -> None:
    train, heldout = prompts("train"), prompts("heldout")
    assert len({*train, *heldout}) == len(train) + len(heldout) and len(train) > 200 and len(heldout) >= 64


@pytest.mark.parametrize("reward", [vader, afinn])
def test_rewards_are_of_the_answer_alone_and_more_sentences_gain_nothing(reward: Reward) -> None:
    warm, plain, cold = "What a lovely, beautiful place!", "It has two doors.", "It is awful and sad."
    scores = reward([asked(text) for text in (warm, plain, cold, f"{warm} {warm} {warm}", "", "  ")])
    assert scores[0] > scores[1] == 0 > scores[2]
    assert scores[3] == pytest.approx(scores[0]) and scores[4:] == [0, 0]
    assert min(scores) >= -5 and max(scores) <= 20


def test_targets_are_the_best_answers_without_the_principle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself is what `make quickstart-llm` does."""
    work = tmp_path / "warmth"
    monkeypatch.setattr(targets, "WORK", work)
    ran: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        ran.append(command)
        rows = [json.loads(line)["messages"] for line in (work / "guided.jsonl").read_text("utf-8").splitlines()]
        parts = Parts(str(work / "targets" / "rollouts" / "raft"), schema=BEST_SCHEMA)
        parts.write(1, [best(i, messages) for i, messages in enumerate(rows[:2])])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    targets.main()
    made = [json.loads(line) for line in (work / "train.jsonl").read_text("utf-8").splitlines()]
    assert made == [{"prompt": prompt, "target": f"answer {i}"} for i, prompt in enumerate(prompts("train")[:2])]
    [principle] = [one.principle for one in load_config("configs/quickstart-llm.yaml").pipelines if one.type == "ple"]
    assert principle in (work / "guided.jsonl").read_text("utf-8")
    targets.main()
    assert len(ran) == 1, "what is there is not made again"


def best(number: int, messages: object) -> dict[str, object]:
    return {
        "step": 1,
        "prompt_id": str(number),
        "prompt": json.dumps(messages),
        "answer": f"answer {number}",
        "reward": 1.0,
        "rewards": [1.0],
        "finish_reason": "stop",
        "engine": "generator-0",
        "prompt_ids": [1],
        "answer_ids": [2],
    }


def test_a_run_that_fails_leaves_no_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "WORK", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda _: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit) as ended:
        targets.main()
    assert ended.value.code == 2 and not (tmp_path / "train.jsonl").exists()
