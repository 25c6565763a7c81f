"""What DLMA, Self-Contrast and RAFT make of answers: pairs, rejections with a reason, and the figures of a part."""

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.frozen_logps import ContrastLogps
from actors.scorer import Scores
from pipelines.context import Context, EventLog
from pipelines.dlma import DlmaMethod
from pipelines.method import Method, Rollout
from pipelines.ple import PleMethod
from pipelines.pool import Pool
from pipelines.raft import RaftMethod
from pipelines.self_contrast import SelfContrastMethod
from plumbline.config.file import parse_config
from plumbline.data.ending import encode_response
from plumbline.data.length_filter import Fit
from plumbline.data.prompting import render
from plumbline.errors import RunError
from plumbline.miniature.tokenizer import make_tokenizer
from plumbline.records import Completion, GenerateRequest, Generation, Message, PolicyRef, Prompt
from plumbline.runs.pairs import pair_samples
from plumbline.runs.rows import Rows
from tests.tiny import tiny_config

TOKENIZER: Any = make_tokenizer()
TARGET = "The goat eats grass."
Answers = Callable[[GenerateRequest], Sequence[str]]


def call(function: Callable[..., Any]) -> Any:
    """A remote method: its arguments may be awaited first, as Ray does with refs."""

    async def answer(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        given = [await one if asyncio.isfuture(one) else one for one in arguments]
        return function(*given, **options)

    return SimpleNamespace(remote=lambda *a, **o: asyncio.ensure_future(answer(a, o)))


def generations(answers: Answers, requests: Sequence[GenerateRequest]) -> list[Generation]:
    return [
        Generation(
            key=request.key,
            ref=request.ref,
            engine="generator-0",
            completions=tuple(
                Completion(text=text, ids=encode_response(TOKENIZER, text), finish_reason="stop")
                for text in answers(request)
            ),
        )
        for request in requests
    ]


def context(tmp_path: Path, section: dict[str, Any], answers: Answers, count: int = 4, **fleet: Any) -> Context:
    """A run of `count` prompts whose actors are functions."""
    rewards = fleet.pop("rewards", {})
    tree = tiny_config(tmp_path) | {"pipelines": [section]} | embedder_of(section)
    tree["deterministic"] = fleet.pop("deterministic", False)
    if section["type"] in ("dlma", "self_contrast") and not rewards:
        del tree["reward"]
    if len(rewards) > 1:
        tree["reward"] = {"type": "sum", "of": PARTS}
    config = parse_config(tree, origin="test")
    prompts = [
        Prompt(id=f"p{i}", messages=(Message(role="user", content=f"Tell me about the goat {i}."),), target=TARGET)
        for i in range(count)
    ]
    generator = SimpleNamespace(generate=call(lambda requests: generations(answers, requests)))
    actors = {"reference": [], "embedder": []} | {k: [SimpleNamespace(**v)] for k, v in fleet.items()}
    scorers = {key: [SimpleNamespace(**one)] for key, one in rewards.items()}
    return Context(
        config=config,
        run_dir=tmp_path / "run",
        device="cpu",
        dtype="float32",
        tokenizer=TOKENIZER,
        rows=Rows(prompts=prompts, fits={config.pipelines[0].name: Fit(prompts=prompts, unfit=[])}),
        events=EventLog(tmp_path / "events.jsonl", lambda event: None),
        fleet=SimpleNamespace(**actors, rewards=scorers, desks={}),  # type: ignore[arg-type]
        fingerprint="f" * 64,
        pool=Pool([generator], capacity=10_000, batch=64),
    )


def roll(method: Method, step: int = 1) -> Rollout:
    return asyncio.run(method.roll_out(step, PolicyRef()))


def reasons(rollout: Rollout) -> dict[str, str]:
    return {str(row["prompt_id"]): str(row["reason"]) for row in rollout.rejected}


# Steps and parts


def test_later_epochs_read_the_parts_again_and_each_prompt_is_drawn_once(tmp_path: Path) -> None:
    section = {"type": "raft", "batch_size": 3, "epochs": 2, "ahead": 5, "generation": {"max_tokens": 16}}
    scorer = {"score_generations": call(lambda queries, drawn: Scores(values=[[1.0] * 4 for _ in drawn]))}
    method = RaftMethod(
        context(tmp_path, section, lambda r: ["a"] * r.n, count=7, rewards={"reward": scorer}), section_of(section)
    )
    assert (method.part_count, method.total, method.slots) == (3, 6, 5)
    assert [method.part(step) for step in range(1, 7)] == [1, 2, 3, 1, 2, 3]
    drawn = [row["prompt_id"] for step in (1, 2, 3) for row in roll(method, step).rows]
    assert sorted(map(str, drawn)) == [f"p{i}" for i in range(7)]
    assert method.ref(5) == PolicyRef(), "always from π0"


def embedder_of(section: dict[str, Any]) -> dict[str, Any]:
    """The config's key, where the pipeline asks an embedder."""
    embeds = section["type"] == "self_contrast" and section.get("filter", True) and "pairs" not in section
    return {"embedder": {"path": "e"}} if embeds else {}


def section_of(tree: dict[str, Any]) -> Any:
    config = {"name": "x", "model": {"path": "m"}, "data": {"train": {"path": "d"}}, "pipelines": [tree]}
    config |= {"reward": {"type": "program", "function": "a:b"}} | embedder_of(tree)
    return parse_config(config, origin="test").pipelines[0]


# DLMA


def contrast(margins: Sequence[float]) -> dict[str, Any]:
    """A reference that gives prompt i the margin R of `margins[i]`."""

    def logps(prompts: Sequence[Any], drawn: Sequence[Generation], *, eos: bool) -> list[ContrastLogps]:
        assert len(drawn) == 2 * len(prompts) and not eos
        return [
            ContrastLogps(
                reference=(-3.0, -4.0), chosen_pos=-10.0 + r, chosen_neg=-10.0, rejected_pos=0, rejected_neg=0
            )
            for r in margins
        ]

    return {"contrast_logps": call(logps)}


def dlma_answers(request: GenerateRequest) -> list[str]:
    number, kind = request.key.split("/")[1:]
    if number == "p1":
        return [""] if kind == "negative" else [TARGET]
    if number == "p2":
        return [TARGET]
    return ["The goat eats grass." if kind == "positive" else "You waste my time."]


def test_a_pipeline_asks_its_own_learner_where_that_answers(tmp_path: Path) -> None:
    section = {"type": "dlma", "name": "mine", "generation": {"max_tokens": 16}}
    run = context(tmp_path, section, dlma_answers, count=1, reference=contrast([1.0]))
    mine, other = SimpleNamespace(**contrast([2.0])), SimpleNamespace(**contrast([3.0]))
    method = DlmaMethod(run, section_of(section))
    assert [row["margin"] for row in roll(method).rows] == [1.0], "a copy, which all share"
    run.fleet.desks = {"other": other, "mine": mine}
    assert [row["margin"] for row in roll(method).rows] == [2.0]


@pytest.mark.parametrize(("name", "same"), [("dlma", True), ("other", False)])
def test_pipelines_that_draw_as_one_ask_the_same_prompts_by_the_same_seeds(
    tmp_path: Path, name: str, same: bool
) -> None:
    def drawn(section: dict[str, Any]) -> tuple[list[str], set[int]]:
        seeds: set[int] = set()

        def answer(request: GenerateRequest) -> list[str]:
            seeds.add(request.seed)
            return [TARGET]

        method = DlmaMethod(
            context(tmp_path / section["name"], section, answer, count=8, reference=contrast([1.0] * 8)),
            section_of(section),
        )
        roll(method)
        return [prompt.id for prompt in method._draw(1)], seeds

    plain = {"type": "dlma", "generation": {"max_tokens": 16}}
    first = drawn({**plain, "name": "dlma"})
    second = drawn({**plain, "name": "copy", "draws_as": name})
    assert len(first[1]) == 16
    assert (first == second) is same


def test_dlma_keeps_pairs_with_their_margin_and_says_why_not(tmp_path: Path) -> None:
    section = {"type": "dlma", "generation": {"max_tokens": 16}, "contrast": {"preset": "helpful"}}
    run = context(tmp_path, section, dlma_answers, count=5)
    method = DlmaMethod(run, section_of(section))
    order = [prompt.id for prompt in method._draw(1)]
    margins = {"p0": 2.5, "p1": 1.0, "p2": 1.0, "p3": math.nan, "p4": -60.0}
    run.fleet.reference = [SimpleNamespace(**contrast([margins[name] for name in order]))]
    rollout = roll(method)
    assert reasons(rollout) == {"p1": "blank answer", "p2": "identical answers", "p3": "margin not finite"}
    by_prompt = {row["prompt_id"]: row for row in rollout.rows}
    assert by_prompt["p0"]["margin"] == 2.5 and by_prompt["p4"]["margin"] == -60.0
    assert by_prompt["p0"]["chosen"] == TARGET and by_prompt["p0"]["model"] == "f" * 64
    [sample] = [s for s in pair_samples(rollout.rows) if s.margins == (2.5,)]
    assert sample.ref_logps == (-3.0, -4.0)
    figures = method.describe(rollout.rows)
    assert figures["margin_mean"] == -28.75
    assert figures["margin_negative_share"] == 0.5
    assert figures["clamp_saturation"] == 0.5, "-60 is below the clamp's -40"
    assert "agreement" not in figures, "there is no reward"


def test_plain_sides_are_asked_the_query_alone_and_ordered_by_the_sign_of_the_margin(tmp_path: Path) -> None:
    section = {"type": "dlma", "sides": "plain", "generation": {"max_tokens": 16}}
    asked: dict[str, list[int]] = {}

    def answer(request: GenerateRequest) -> list[str]:
        asked[request.key] = request.prompt_ids
        return ["You waste my time."] if request.key.endswith("first") else [TARGET]

    run = context(tmp_path, section, answer, count=2)
    method = DlmaMethod(run, section_of(section))
    margins = {"p0": 2.5, "p1": -2.5}
    order = [prompt.id for prompt in method._draw(1)]
    run.fleet.reference = [SimpleNamespace(**contrast([margins[name] for name in order]))]
    by_prompt = {row["prompt_id"]: row for row in roll(method).rows}
    plain = {prompt.id: render(TOKENIZER, prompt.messages) for prompt in run.rows.prompts}
    assert asked == {f"1/{name}/{kind}": plain[name] for name in plain for kind in ("first", "second")}
    first, second = by_prompt["p0"], by_prompt["p1"]
    assert (first["chosen"], first["rejected"]) == ("You waste my time.", TARGET)
    assert (second["chosen"], second["rejected"]) == (TARGET, "You waste my time."), "R prefers the second"
    assert first["margin"] == second["margin"] == 2.5
    assert (first["ref_chosen_logps"], second["ref_chosen_logps"]) == (-3.0, -4.0)
    assert (second["chosen_pos"], second["rejected_pos"]) == (0, -12.5)


def test_dlma_agrees_where_the_sign_of_the_margin_is_the_rewards(tmp_path: Path) -> None:
    section = {"type": "dlma", "generation": {"max_tokens": 16}}
    method = DlmaMethod(context(tmp_path, section, dlma_answers), section_of(section))
    rows = [
        {"margin": margin, "chosen_reward": chosen, "rejected_reward": rejected}
        for margin, chosen, rejected in ((1.0, 2.0, 1.0), (-1.0, 2.0, 1.0), (-1.0, 1.0, 2.0), (5.0, 1.0, 1.0))
    ]
    figures = method.describe(rows)
    assert figures["agreement"] == pytest.approx(2 / 3), "the tie of the reward does not count"
    assert (figures["reward_chosen"], figures["reward_rejected"]) == (1.5, 1.25)


# Self-Contrast

SC = {"type": "self_contrast", "samples": 4, "keep": 0.5, "negatives": 2, "generation": {"max_tokens": 16}}
SPIN = {key: value for key, value in SC.items() if key != "keep"} | {"samples": 1, "negatives": 1, "filter": False}
REFERENCE = {"logps": call(lambda groups: [[-1.0 - k for k in range(len(g.response_ids))] for g in groups])}


def embedder(similarities: Sequence[float]) -> dict[str, Any]:
    return {"similarities": call(lambda targets, drawn: [list(similarities) for _ in drawn])}


def test_self_contrast_takes_the_least_similar_and_the_target(tmp_path: Path) -> None:
    texts = ["What a dull question.", "You waste my time.", "The goat eats moths.", "Only a fool would ask that."]
    run = context(tmp_path, SC, lambda r: texts, reference=REFERENCE, embedder=embedder([0.9, 0.1, 0.8, 0.2]))
    method = SelfContrastMethod(run, section_of(SC))
    rollout = roll(method)
    assert len(rollout.rows) == 8 and not rollout.rejected
    assert {(row["rejected"], row["similarity"]) for row in rollout.rows} == {(texts[1], 0.1), (texts[3], 0.2)}
    assert all(row["chosen"] == TARGET and row["chosen_finish_reason"] is None for row in rollout.rows)
    [first, *_] = samples = pair_samples(rollout.rows)
    assert len(samples) == 4 and len(first.group.response_ids) == 3
    assert (first.ref_logps, first.margins) == ((-1.0, -2.0, -3.0), ())
    figures = method.describe(rollout.rows)
    assert figures["retention"] == 1.0
    assert (figures["similarity_q10"], figures["similarity_q90"]) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize(
    ("texts", "similarities"),
    [
        ([TARGET] * 4, [1.0] * 4),  # the target is equal to every sample
        (["a goat", "the goat", "an owl", "the owl"], [math.nan] * 4),  # the embedder returns zeros
        (["", " ", "an owl", "the owl"], [math.nan, math.nan, 0.1, 0.2]),  # too few are left
    ],
)
def test_a_prompt_without_enough_negatives_is_dropped_and_counted(
    tmp_path: Path, texts: list[str], similarities: list[float]
) -> None:
    run = context(tmp_path, SC, lambda r: texts, reference=REFERENCE, embedder=embedder(similarities))
    method = SelfContrastMethod(run, section_of(SC))
    rollout = roll(method)
    assert rollout.rows == []
    assert reasons(rollout) == {f"p{i}": "too few negatives" for i in range(4)}
    assert method.describe([]) == {"retention": 0.0}


def test_spin_is_one_sample_without_a_filter(tmp_path: Path) -> None:
    spin = {**SPIN}
    run = context(tmp_path, spin, lambda r: ["You waste my time."] * r.n, reference=REFERENCE)
    rollout = roll(SelfContrastMethod(run, section_of(spin)))
    assert [(row["rejected"], row["similarity"]) for row in rollout.rows] == [("You waste my time.", None)] * 4


def test_the_positive_ends_where_a_sample_would(tmp_path: Path) -> None:
    """At a stop string both end before it: their last tokens do not tell them apart."""
    spin = {**SPIN, "generation": {"max_tokens": 16, "stop": [" grass"]}}
    run = context(tmp_path, spin, lambda r: ["You waste my time"] * r.n, reference=REFERENCE)
    rows = roll(SelfContrastMethod(run, section_of(spin))).rows
    assert {row["chosen"] for row in rows} == {"The goat eats"}
    assert {tuple(row["chosen_ids"]) for row in rows} == {tuple(encode_response(TOKENIZER, "The goat eats"))}  # type: ignore[arg-type]
    spin["generation"] = {"max_tokens": 16, "stop": ["The"]}
    run = context(tmp_path, spin, lambda r: ["You waste my time"] * r.n, reference=REFERENCE)
    assert reasons(roll(SelfContrastMethod(run, section_of(spin)))) == {f"p{i}": "blank target" for i in range(4)}


def test_data_accuracy_is_of_the_negatives_below_their_target(tmp_path: Path) -> None:
    lengths = call(lambda queries, answers: Scores(values=[[float(len(one)) for one in texts] for texts in answers]))
    scorer = {"score_answers": lengths}
    texts = ["The goat eats a lot of grass.", "No.", "The goat lives in muddy ponds.", "Go."]
    run = context(
        tmp_path,
        SC,
        lambda r: texts,
        reference=REFERENCE,
        embedder=embedder([0.1, 0.2, 0.9, 0.8]),
        rewards={"reward": scorer},
    )
    method = SelfContrastMethod(run, section_of(SC))
    figures = method.describe(roll(method).rows)
    assert figures["data_accuracy"] == 0.5
    assert figures["reward_chosen"] == len(TARGET)


# RAFT


def test_raft_keeps_the_best_answer_that_has_a_finite_reward(tmp_path: Path) -> None:
    section = {"type": "raft", "samples": 3, "generation": {"max_tokens": 16}}
    rewards = [0.5, math.nan, 0.75]
    scorer = {"score_generations": call(lambda queries, drawn: Scores(values=[rewards for _ in drawn]))}
    run = context(tmp_path, section, lambda r: ["one", "", "two"], rewards={"reward": scorer})
    rollout = roll(RaftMethod(run, section_of(section)))
    assert {(row["answer"], row["reward"]) for row in rollout.rows} == {("two", 0.75)}
    assert all(row["rewards"] == [0.5, 0.75] for row in rollout.rows)


def test_raft_rejects_a_prompt_without_any(tmp_path: Path) -> None:
    section = {"type": "raft", "generation": {"max_tokens": 16}}
    scorer = {"score_generations": call(lambda queries, drawn: Scores(values=[[math.nan] * 4 for _ in drawn]))}
    method = RaftMethod(context(tmp_path, section, lambda r: [""] * 4, rewards={"reward": scorer}), section_of(section))
    assert set(reasons(roll(method)).values()) == {"no answer with a finite reward"}


def failing(on: Callable[[int], bool]) -> dict[str, Any]:
    """A scorer whose reward fails on the calls, counted from 0, that `on` names."""
    calls = iter(range(10**6))

    def score(queries: Sequence[Any], drawn: Sequence[Generation]) -> Scores:
        if on(next(calls)):
            return Scores(values=[[math.nan] * len(one.completions) for one in drawn], failure="KeyError: 'weight'")
        return Scores(values=[[1.0] * len(one.completions) for one in drawn])

    return {"score_generations": call(score)}


@pytest.mark.parametrize("kind", ["raft", "ple"])
def test_the_batch_that_a_reward_failed_on_is_rejected_with_the_reason(tmp_path: Path, kind: str) -> None:
    section = {"type": kind, "batch_size": 4, "generation": {"max_tokens": 16}}
    answers = {"guided": "You waste my time."}
    run = context(
        tmp_path,
        section,
        lambda r: [answers.get(r.key.split("/")[-1], TARGET)] * r.n,
        rewards={"reward": failing(lambda n: n == 1)},
    )
    said: list[Any] = []
    run.events.say = said.append  # type: ignore[method-assign]
    method = {"raft": RaftMethod, "ple": PleMethod}[kind](run, section_of(section))
    first, second, third = (roll(method, step) for step in (1, 2, 3))
    assert (len(first.rows), len(second.rows), len(third.rows)) == (4, 0, 4)
    assert {(row["reason"], row["detail"]) for row in second.rejected} == {("reward failed", "KeyError: 'weight'")}
    [line] = said
    assert line.startswith(f"{kind}: reward failed on") and line.endswith("KeyError: 'weight'")


@pytest.mark.parametrize(("every", "ends_at"), [(1, 3), (5, 11), (20, None)])
def test_a_reward_that_fails_on_too_large_a_share_ends_the_pipeline(
    tmp_path: Path, every: int, ends_at: int | None
) -> None:
    section = {"type": "raft", "batch_size": 1, "generation": {"max_tokens": 16}}
    scorer = failing(lambda n: n % every == 0)
    method = RaftMethod(
        context(tmp_path, section, lambda r: ["a"] * r.n, rewards={"reward": scorer}), section_of(section)
    )

    def rolled() -> int | None:
        for step in range(1, 250):
            try:
                roll(method, step)
            except ExceptionGroup as group:
                [error] = group.exceptions
                assert isinstance(error, RunError)
                assert "is more than reward.max_failed (0.1) lets pass: KeyError: 'weight'" in str(error)
                return step
        return None

    assert rolled() == ends_at


def test_a_reward_that_only_looks_on_costs_no_pair(tmp_path: Path) -> None:
    broken = call(lambda queries, answers: Scores(values=[[math.nan] * len(a) for a in answers], failure="no"))
    scorer = {"score_answers": broken}
    run = context(
        tmp_path,
        SC,
        lambda r: [f"{i}" for i in range(r.n)],
        reference=REFERENCE,
        embedder=embedder([0.1, 0.2, 0.9, 0.8]),
        rewards={"reward": scorer},
    )
    rollout = roll(SelfContrastMethod(run, section_of(SC)))
    assert rollout.rows and not rollout.rejected and {row["chosen_reward"] for row in rollout.rows} == {None}


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    section = {"type": "raft", "generation": {"max_tokens": 16}}
    with pytest.raises(RunError, match="no prompt is left"):
        RaftMethod(context(tmp_path, section, lambda r: [], count=0), section_of(section))


# A reward that is a sum


def scoring(score: Callable[[str], float], fails_on: str = "") -> dict[str, Any]:
    """A part's scorer: a number by the answer's text, and a failure on one text."""

    def found(texts: Sequence[Sequence[str]]) -> Scores:
        values = [[math.nan if one == fails_on else score(one) for one in own] for own in texts]
        return Scores(values=values, failure="KeyError: 'weight'" if any(fails_on in own for own in texts) else "")

    return {
        "score_generations": call(lambda _, drawn: found([[one.text for one in g.completions] for g in drawn])),
        "score_answers": call(lambda _, texts: found(texts)),
    }


PARTS = [
    {"reward": {"type": "program", "function": "a:b"}, "name": "long", "weight": 2.0},
    {"reward": {"type": "program", "function": "a:c", "max_failed": 1}, "name": "flat", "weight": -0.5},
]


def parts(fails_on: str = "") -> dict[str, Any]:
    return {
        "reward.of.0.reward": scoring(len),
        "reward.of.1.reward": scoring(lambda text: 4.0, fails_on),
    }


def kept(method: Method, rollout: Rollout) -> list[dict[str, Any]]:
    """Rows as a part keeps them."""
    method.parts.write(1, rollout.rows)
    return method.parts.read(1)


def test_a_pairs_score_is_the_weighted_sum_of_its_parts_and_each_parts_mean_is_told(tmp_path: Path) -> None:
    section = {"type": "ple", "batch_size": 4, "generation": {"max_tokens": 16}}
    run = context(tmp_path, section, lambda r: ["No." if r.key.endswith("plain") else TARGET], rewards=parts())
    method = PleMethod(run, section_of(section))
    rows = kept(method, roll(method))
    assert {(row["plain_reward"], row["guided_reward"]) for row in rows} == {(2 * 3 - 2, 2 * 20 - 2)}
    assert rows[0]["plain_reward_parts"] == {"long": 3.0, "flat": 4.0}
    told = {name: value for name, value in method.describe(rows).items() if "." in name}
    assert told == {
        "reward_plain.long": 3.0,
        "reward_plain.flat": 4.0,
        "reward_guided.long": 20.0,
        "reward_guided.flat": 4.0,
    }


def test_raft_takes_the_best_by_the_sum(tmp_path: Path) -> None:
    section = {"type": "raft", "samples": 3, "generation": {"max_tokens": 16}}
    run = context(tmp_path, section, lambda r: ["a", "abc", "ab"], rewards=parts())
    method = RaftMethod(run, section_of(section))
    rows = kept(method, roll(method))
    assert {(row["answer"], row["reward"], row["reward_parts"]["long"]) for row in rows} == {("abc", 4.0, 3.0)}
    told = method.describe(rows)
    assert (told["reward_best.long"], told["reward_mean.long"], told["reward_mean.flat"]) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize("section", [{"type": "dlma"}, {"type": "self_contrast", "samples": 4, "negatives": 1}])
def test_pairs_keep_what_each_part_gave(tmp_path: Path, section: dict[str, Any]) -> None:
    section |= {"batch_size": 4, "generation": {"max_tokens": 16}}
    actors: dict[str, Any] = (
        {"reference": contrast([1.0] * 4)}
        if section["type"] == "dlma"
        else {"reference": REFERENCE, "embedder": embedder([0.1, 0.2, 0.9, 0.8])}
    )
    texts = {"positive": [TARGET], "negative": ["No."]}
    answers = lambda r: texts.get(r.key.split("/")[-1], ["a", "b", "c", "d"])  # noqa: E731
    run = context(tmp_path, section, answers, rewards=parts(), **actors)
    method = {"dlma": DlmaMethod, "self_contrast": SelfContrastMethod}[section["type"]](run, section_of(section))
    rows = kept(method, roll(method))
    assert rows and all(
        row[f"{side}_reward_parts"] == {"long": float(len(row[side])), "flat": 4.0}
        for row in rows
        for side in ("chosen", "rejected")
    )
    told = method.describe(rows)
    assert told["reward_chosen.long"] == len(rows[0]["chosen"]) and told["reward_rejected.flat"] == 4.0


@pytest.mark.parametrize("kind", ["raft", "ple"])
def test_an_answer_that_one_part_failed_on_is_rejected_with_that_parts_reason(tmp_path: Path, kind: str) -> None:
    section = {"type": kind, "batch_size": 4, "generation": {"max_tokens": 16}}
    plain = ["You waste my time." if i == 2 else "No." for i in range(4)]
    answers = lambda r: [plain[int(r.key.split("/")[1][1:])] if r.key[-1] != "d" else TARGET] * r.n  # noqa: E731
    run = context(tmp_path, section, answers, rewards=parts(fails_on="You waste my time."))
    said: list[Any] = []
    run.events.say = said.append  # type: ignore[method-assign]
    method = {"raft": RaftMethod, "ple": PleMethod}[kind](run, section_of(section))
    rollout = roll(method)
    assert len(rollout.rows) == 3
    [lost] = rollout.rejected
    assert (lost["prompt_id"], lost["reason"], lost["detail"]) == ("p2", "reward failed", "flat: KeyError: 'weight'")
    assert len(said) == 1 and f"{kind}: reward.of.1.reward failed on" in said[0]


def test_a_part_that_fails_too_often_ends_the_pipeline_by_its_own_key(tmp_path: Path) -> None:
    section = {"type": "raft", "batch_size": 1, "generation": {"max_tokens": 16}}
    broken = {"reward.of.0.reward": scoring(len, "a"), "reward.of.1.reward": scoring(len)}
    method = RaftMethod(context(tmp_path, section, lambda r: ["a"] * r.n, rewards=broken), section_of(section))
    with pytest.raises(ExceptionGroup) as caught:
        for step in range(1, 10):
            roll(method, step)
    assert "more than reward.of.0.reward.max_failed (0.1) lets pass: KeyError: 'weight'" in str(
        caught.value.exceptions[0]
    )


def test_replicas_of_all_parts_take_turns(tmp_path: Path) -> None:
    section = {"type": "raft", "generation": {"max_tokens": 16}}
    method = RaftMethod(context(tmp_path, section, lambda r: ["a"] * r.n, rewards=parts()), section_of(section))
    method._context.fleet.rewards.update({"reward.of.0.reward": ["a0", "a1"], "reward.of.1.reward": ["b0", "b1"]})
    assert [method.reward.scorers() for _ in range(3)] == [["a0", "b0"], ["a1", "b1"], ["a0", "b0"]]


# Deterministic runs


@pytest.mark.parametrize("deterministic", [False, True])
def test_chunks_of_a_deterministic_step_take_turns(tmp_path: Path, deterministic: bool) -> None:
    """What an engine decodes together, and what a scorer is asked after what, must not depend on who is quicker."""
    section = {"type": "raft", "batch_size": 6, "generation": {"max_tokens": 16}}
    scorer = {"score_generations": call(lambda queries, drawn: Scores(values=[[1.0] * 4 for _ in drawn]))}
    run = context(
        tmp_path,
        section,
        lambda r: ["a"] * r.n,
        count=6,
        rewards={"reward": scorer},
        deterministic=deterministic,
    )
    run.pool.batch = 8  # two prompts a chunk
    method = RaftMethod(run, section_of(section))
    under_way = most = 0
    chunk = method._roll_chunk

    async def watched(*args: Any) -> Rollout:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await chunk(*args)
        finally:
            under_way -= 1

    method._roll_chunk = watched  # type: ignore[method-assign]
    drawn = [row["prompt_id"] for row in roll(method).rows]
    assert sorted(map(str, drawn)) == [f"p{i}" for i in range(6)]
    assert (most, method.slots) == ((1, 1) if deterministic else (3, 4))


@pytest.mark.parametrize(("staleness", "deterministic", "slots"), [(3, False, 4), (0, False, 1), (1, True, 1)])
def test_a_step_of_ple_waits_for_as_many_versions_as_it_may_be_behind(
    tmp_path: Path, staleness: int, deterministic: bool, slots: int
) -> None:
    section = {"type": "ple", "max_staleness": staleness}
    run = context(tmp_path, section, lambda r: ["a"], deterministic=deterministic)
    assert PleMethod(run, section_of(section)).slots == slots
