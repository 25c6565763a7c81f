"""What an evaluation keeps when something of it fails."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.scorer import Scores
from pipelines import evaluate
from pipelines.evaluate import (
    JUDGED_AT_ONCE,
    Answers,
    answers_by_name,
    answers_ppl,
    reward_columns,
    scores_of,
    summarize,
)
from pipelines.rewarding import Rewarding
from pipelines.run import watched
from plumbline.config.data import ProgramReward, SumReward
from plumbline.errors import LostError, RunError
from plumbline.records import Completion, GenerateRequest, Message, PolicyRef, Prompt, Sampling, TokenGroup
from plumbline.report.files import read_evaluation
from plumbline.runs.evaluated import prompt_key, read_answers

PROMPTS = [Prompt(id=str(i), messages=(Message(role="user", content=f"Why {i}?"),)) for i in range(2)]


def answers(rewards: list[float]) -> Answers:
    return Answers(
        plain=["a", "b"],
        guided=[],
        rewards=rewards,
        guided_rewards=[],
        judged=[],
        judged_guided=[],
        lengths=[1, 2],
        finished=1.0,
        ppl=None,
    )


def context(run_dir: Path, said: list[str], rewards: dict[str, Any] | None = None) -> Any:
    settings = SimpleNamespace(generation=object(), samples=2)
    config = SimpleNamespace(evaluation=settings, methods=[])
    events, fleet = SimpleNamespace(say=said.append), SimpleNamespace(rewards=rewards)
    return SimpleNamespace(config=config, run_dir=run_dir, events=events, fleet=fleet, pick=lambda each: each[0])


def test_what_was_measured_of_other_versions_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers_of(_: Any, ref: PolicyRef, *__: Any) -> Answers:
        if ref.version == 2:
            raise LostError("the generator is gone")
        return answers([1.0 + ref.version, 2.0])

    monkeypatch.setattr(evaluate, "answers_of", answers_of)
    refs = {"before": PolicyRef(), **{f"ple{v}": PolicyRef(policy="ple", version=v) for v in (1, 2)}}
    with pytest.raises(LostError):
        asyncio.run(answers_by_name(context(tmp_path, []), refs, PROMPTS))
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["rewards"] == {"before": [1.0, 2.0], "ple1": [2.0, 2.0]}
    assert kept["prompts"] == [prompt_key(prompt) for prompt in PROMPTS]
    by_version = read_answers(tmp_path)
    assert {who: [row["reward"] for row in rows] for who, rows in by_version.items()} == {
        "base": [1.0, 2.0],
        "ple@1": [2.0, 2.0],
    }
    assert [(row["prompt"], row["answer"]) for row in by_version["ple@1"]] == [("Why 0?", "a"), ("Why 1?", "b")]


def test_answers_of_a_models_directory_are_kept_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers_of(*_: Any) -> Answers:
        return answers([math.nan, 2.0])

    monkeypatch.setattr(evaluate, "answers_of", answers_of)
    asyncio.run(answers_by_name(context(tmp_path, []), {"./my model": PolicyRef(), 300 * "d": PolicyRef()}, PROMPTS))
    kept = read_answers(tmp_path)
    assert list(kept) == ["./my model", 200 * "d"]
    assert [row["reward"] for row in kept["./my model"]] == [None, 2.0]


def test_a_watcher_that_fails_is_told_and_the_run_goes_on_to_its_evaluation(tmp_path: Path) -> None:
    async def fails() -> None:
        raise RunError("an actor is gone")

    said: list[str] = []
    asyncio.run(watched(context(tmp_path, said), fails()))
    assert said == ["what looks on beside the pipelines failed: an actor is gone"]


def test_a_reward_that_fails_on_a_batch_leaves_the_others_scores(tmp_path: Path) -> None:
    async def score(queries: list[Any], drawn: list[Any]) -> Scores:
        if 0 in drawn:
            return Scores(values=[[math.nan]] * len(drawn), failure="KeyError: 'a'")
        return Scores(values=[[float(one)] for one in drawn])

    said: list[str] = []
    scorer = SimpleNamespace(score_generations=SimpleNamespace(remote=score))
    count = 2 * JUDGED_AT_ONCE + 3
    run = context(tmp_path, said, {"reward": [scorer]})
    reward = Rewarding(run, "evaluation", ProgramReward(type="program", function="a:b"))
    scores, parts = asyncio.run(scores_of(reward, list(range(count)), list(range(count))))  # type: ignore[arg-type]
    assert parts == {}
    assert len(scores) == count and scores[JUDGED_AT_ONCE:] == list(map(float, range(JUDGED_AT_ONCE, count)))
    assert all(map(math.isnan, scores[:JUDGED_AT_ONCE])) and len(said) == 1


def test_an_evaluation_without_any_finite_reward_has_its_other_figures() -> None:
    assert reward_columns("", [math.nan, math.nan], []) == {}
    rows = summarize({"before": answers([1.0, 2.0]), "ple": answers([math.nan, math.nan])}, PROMPTS, 1)["rows"]
    assert rows[1]["tokens"] == 1.5 and "win rate" not in rows[1] and "reward" not in rows[1]


def test_what_the_base_thinks_of_answers_is_over_their_own_tokens_after_plain_prompts() -> None:
    asked: list[TokenGroup] = []

    async def logprobs(groups: list[TokenGroup], ref: PolicyRef) -> list[list[list[float]]]:
        assert ref == PolicyRef()
        asked.extend(groups)
        return [[[-math.log(2.0)] * len(group.response_ids[0])] for group in groups]

    async def ask(_: str, answers: int, tokens: int, call: Any) -> Any:
        assert (answers, tokens) == (1, 3)
        return await call(SimpleNamespace(logprobs=SimpleNamespace(remote=logprobs)))

    requests = [
        GenerateRequest(
            key=str(i),
            prompt_ids=[7, i],
            ref=PolicyRef(policy="ple", version=3),
            sampling=Sampling(max_tokens=4),
            seed=0,
        )
        for i in range(2)
    ]
    drawn = [Completion(text="", ids=[], finish_reason="length"), Completion(text="x", ids=[4], finish_reason="stop")]
    config = SimpleNamespace(model=SimpleNamespace(max_len=4))
    run: Any = SimpleNamespace(pool=SimpleNamespace(batch=8, ask=ask), config=config)
    assert asyncio.run(answers_ppl(run, PolicyRef(), requests, drawn)) == pytest.approx(2.0)
    assert asked == [TokenGroup([7, 1], [[4]])]
    assert asyncio.run(answers_ppl(run, PolicyRef(), requests[:1], drawn[:1])) is None
    asked.clear()
    full = [Completion(text="x y", ids=[4, 5], finish_reason="length")]
    assert asyncio.run(answers_ppl(run, PolicyRef(), requests[:1], full)) == pytest.approx(2.0)
    assert asked == [TokenGroup([7, 0], [[4]])], "an engine has no room for a token after the last of max_len"


def test_an_evaluation_without_a_reward_is_one_that_the_report_reads(tmp_path: Path) -> None:
    result = summarize({"before": answers([]), "dpo": answers([])}, PROMPTS, 1)
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    assert result["rewards"] == {} and read_evaluation(tmp_path / "evaluation.json") == result


def test_an_evaluation_tells_the_mean_of_each_part_of_a_sum(tmp_path: Path) -> None:
    def scorer(times: float) -> Any:
        async def score(queries: list[Any], drawn: list[Any]) -> Scores:
            return Scores(values=[[times * one] for one in drawn])

        return SimpleNamespace(score_generations=SimpleNamespace(remote=score))

    of = [
        {"reward": {"type": "program", "function": "a:b"}, "name": "one", "weight": 2.0},
        {"reward": {"type": "program", "function": "a:c"}, "name": "ten", "weight": -1.0},
    ]
    run = context(tmp_path, [], {"reward.of.0.reward": [scorer(1.0)], "reward.of.1.reward": [scorer(10.0)]})
    reward = Rewarding(run, "evaluation", SumReward.model_validate({"type": "sum", "of": of}))
    count = JUDGED_AT_ONCE + 3
    scores, parts = asyncio.run(scores_of(reward, list(range(count)), list(range(count))))  # type: ignore[arg-type]
    assert scores == [2.0 * i - 10.0 * i for i in range(count)]
    assert parts == {"one": list(map(float, range(count))), "ten": [10.0 * i for i in range(count)]}
    told = replace(answers([1.0, 2.0]), parts={"reward one": [1.0, 3.0], "reward ten": [math.nan, 7.0]})
    [row] = summarize({"before": told}, PROMPTS, 1)["rows"]
    assert (row["reward one"]["mean"], row["reward ten"]["mean"], row["reward ten"]["n"]) == (2.0, 7.0, 1)
