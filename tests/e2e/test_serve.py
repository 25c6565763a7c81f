"""The endpoint, asked by OpenAI's client: beside a run that trains on the same engine, then over what it left."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from peft import PeftModel
from schemathesis.checks import not_a_server_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.mutations import ask_many
from plumbline.runs.promotions import promoted
from tests.endpoints import KEY, TURN, Users, client, first_logprob, free_port, healthy, served, wait_until
from tests.runs import LIMIT_S, events, finish, kill, leftovers, start, wait_for
from tests.tiny import make_prompts, tiny_config

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 64


@dataclass
class Live:
    """A run under way, its address, and what users were answered meanwhile."""

    directory: Path
    process: subprocess.Popen[str]
    url: str
    answers: list[tuple[str, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has."""
        return json.loads((self.directory / "model" / "config.json").read_text())["vocab_size"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("serve")
    config = tiny_config(directory, steps=STEPS, learner={"lr": 5e-3, "batch_size": 8})
    make_prompts(directory / "heldout.jsonl", 8, seed=1)
    (directory / "keys").write_text(KEY + "\n")
    port = free_port()
    config["data"]["heldout"] = {"path": str(directory / "heldout.jsonl")}
    config["evaluation"] = {"prompts": 8}
    bounds = {"max_reward_drop": 9, "max_ppl_rise": 9, "length": [0, 9]}
    gate = {"every": 1000, "prompts": 8, **bounds}  # only the last version is looked at
    config["serve"] = {"enabled": True, "port": port, "api_keys": str(directory / "keys"), "gate": gate}
    one = Live(directory, start(directory, config), f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: healthy(one.url), one.process, "the endpoint")
        yield one
    finally:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
            one.process.communicate(timeout=60)


def test_users_are_answered_while_every_step_brings_a_version(live: Live) -> None:
    """None fails, while an alias is moved forth and back by hand; moving it takes less than two seconds."""
    talker, over = client(live.url), threading.Event()

    def ask(name: Callable[[], str]) -> None:
        while not over.is_set():
            try:
                live.answers.append(first_logprob(talker, name()))
            except openai.OpenAIError as error:
                live.failures.append(repr(error))

    def newest() -> str:
        return f"ple@{max(1, len(events(live.directory)))}"

    assert first_logprob(talker, "ple")[0] == "base", "nothing is promoted yet"
    wait_for(live.directory, live.process, steps=2)
    users = [threading.Thread(target=ask, args=(name,)) for name in (lambda: "ple", lambda: "base", newest, newest)]
    for user in users:
        user.start()
    try:
        for steps, move, meant in ((4, ["promote", "ple@3"], "ple@3"), (8, ["promote", "ple@7"], "ple@7"),
                                   (12, ["rollback", "ple"], "ple@3")):  # fmt: skip
            wait_for(live.directory, live.process, steps)
            arguments = [sys.executable, "-m", "cli", move[0], str(live.run_dir), move[1]]
            began = time.monotonic()
            done = subprocess.run(arguments, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
            assert first_logprob(talker, "ple")[0] == meant
            assert time.monotonic() - began < 2 * slowness()
    finally:
        over.set()
        for user in users:
            user.join()
    assert live.failures == []
    versions = [version for version, _ in live.answers]
    assert {"base", "ple@3", "ple@7"} <= set(versions) and len(set(versions)) >= 8, versions


def slowness() -> float:
    """How much longer than on a quiet machine with two processors things take."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def check_protocol(url: str, vocabulary: int) -> None:
    """What users of OpenAI's client expect, on any placement."""
    talker = client(url)
    assert {model.id for model in talker.models.list()} == {"base", "ple"}
    answer = talker.chat.completions.create(model="ple", messages=TURN, max_tokens=8, n=2, seed=7, logprobs=True)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage and answer.usage.completion_tokens > 2
    again = talker.chat.completions.create(model=answer.model, messages=TURN, max_tokens=8, n=2, seed=7)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices], "seeded"
    content = answer.choices[0].logprobs
    assert content and content.content and all(token.logprob <= 0 for token in content.content)
    whole = talker.chat.completions.create(model=answer.model, messages=TURN, max_tokens=8, temperature=0)
    pieces = talker.chat.completions.create(
        model=answer.model,
        messages=TURN,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    got = list(pieces)
    assert "".join(p.choices[0].delta.content or "" for p in got if p.choices) == whole.choices[0].message.content
    assert got[-1].usage == whole.usage and len(got) > 3
    text = talker.completions.create(model="base", prompt="The goat", max_tokens=4, logprobs=2, echo=True)
    assert text.choices[0].text.startswith("The goat") and text.choices[0].logprobs
    stopped = talker.completions.create(model="base", prompt="The goat", max_tokens=16, stop=[" "], seed=1)
    assert " " not in stopped.choices[0].text.strip()
    alike = chat(talker, model=answer.model, max_tokens=8, n=3, temperature=0)
    assert [c.message.content for c in alike.choices] == [whole.choices[0].message.content] * 3
    response = talker.responses.create(model=answer.model, input=TURN, max_output_tokens=8, temperature=0)
    assert response.output_text == whole.choices[0].message.content and response.status in ("completed", "incomplete")
    refused: list[tuple[type[openai.APIStatusError], int, str | None, Callable[[], Any]]] = [
        (openai.NotFoundError, 404, "model_not_found", lambda: chat(talker, model="nope")),
        (openai.NotFoundError, 404, "model_not_found", lambda: chat(talker, model="../run")),
        (openai.NotFoundError, 404, "model_not_found", lambda: talker.models.retrieve("ple@9999")),
        (openai.AuthenticationError, 401, "invalid_api_key", lambda: chat(client(url, "sk-wrong-wrong-wrong"))),
        (openai.BadRequestError, 400, "context_length_exceeded", lambda: chat(talker, messages=TURN * 60)),
        (openai.BadRequestError, 400, None, lambda: talker.completions.create(model="base", prompt=[vocabulary])),
        (openai.BadRequestError, 400, None, lambda: chat(talker, logit_bias={str(vocabulary): 1})),
        (openai.BadRequestError, 400, None, lambda: chat(talker, n=99)),
        (openai.BadRequestError, 400, None, lambda: chat(talker, temperature=-1)),
        (openai.BadRequestError, 400, None, lambda: chat(talker, extra_body={"chat_template": "x"})),
        (openai.BadRequestError, 400, None, lambda: chat(talker, extra_body={"chat_template_kwargs": {"x": 1}})),
    ]
    for kind, status, code, call in refused:
        with pytest.raises(kind) as caught:
            call()
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.type == "invalid_request_error"
    quoted, plain = (chat(talker, messages=[{"role": "user", "content": c}]) for c in ("<|im_end|>", "."))
    assert quoted.usage.prompt_tokens > plain.usage.prompt_tokens, "a mark that a user writes is text, not one token"
    last = talker.completions.create(model="base", prompt=[vocabulary - 1], max_tokens=2)
    assert last.usage and last.usage.prompt_tokens == 1, "the engine lives, and knows its last token"
    header = {"Authorization": f"Bearer {KEY}"}
    broken = httpx.post(f"{url}/v1/chat/completions", content=b'{"model": ', headers=header)
    assert broken.status_code == 400 and "JSON" in broken.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/models").status_code == 401


def chat(talker: openai.OpenAI, **given: Any) -> Any:
    return talker.chat.completions.create(**{"model": "base", "messages": TURN, "max_tokens": 2, **given})


def test_the_pool_speaks_openais_protocol(live: Live) -> None:
    check_protocol(live.url, live.vocabulary)


def test_the_run_goes_on_and_ends_by_itself(live: Live) -> None:
    """With the endpoint, and without a trace of the key."""
    code, out, err = finish(live.process)
    assert code == 0, err
    assert f"serving base, ple on {live.url}/v1" in out
    kept = [p for p in live.run_dir.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".json", ".yaml", ".log")]
    assert all(KEY not in p.read_text("utf-8") for p in kept) and KEY not in out + err
    assert promoted(live.run_dir, "ple") == [3, STEPS]
    moves = [(e["by"], e["version"]) for e in events(live.directory, "serve")]
    assert moves == [("hand", 3), ("hand", 7), ("rollback", 3), ("gate", STEPS)]
    assert set(events(live.directory, "serve")[-1]["figures"]) == {"new", "promoted", "base"}
    assert leftovers(live.directory) == []


@pytest.fixture(scope="module")
def over(live: Live) -> Iterator[str]:
    """Engines of its own over the run's directory, in a process that is left running."""
    with served(live.directory, "--api-keys", str(live.directory / "keys")) as url:
        yield url
    assert leftovers(live.directory) == []


def test_replicas_speak_openais_protocol(live: Live, over: str) -> None:
    check_protocol(over, live.vocabulary)


def test_what_users_were_answered_meanwhile_is_what_these_versions_answer(live: Live, over: str) -> None:
    """No answer mixed versions: each is that of the one that its header named, and of no other."""
    talker = client(over)
    alone = {name: first_logprob(talker, name)[1] for name in {version for version, _ in live.answers}}
    assert len({round(value, 3) for value in alone.values()}) > len(alone) / 2, "versions differ, or nothing is shown"
    for version, logprob in live.answers:
        assert math.isclose(logprob, alone[version], abs_tol=2e-4), (version, logprob, alone[version])


def test_wrong_requests_by_the_hundred_are_no_server_errors(over: str) -> None:
    """`benchmarks/mutations.py` asks ten thousand."""
    statuses = ask_many(over, 500, KEY)
    assert max(statuses) < 500 and {200, 400, 499} <= set(statuses), statuses
    header = {"Authorization": f"Bearer {KEY}"}
    assert "plumbline_serve_in_flight 0.0" in httpx.get(f"{over}/metrics", headers=header).text


def test_thirty_two_who_stream_meet_no_error(over: str) -> None:
    """For ten seconds; `make test-faults` has them ask for two minutes."""
    with Users(over, count=32, model="base", streams=True) as users:
        time.sleep(10)
    assert users.failures() == []


DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai chat": ("chat/completions", {"messages": TURN}),
    "openai completion": ("completions", {"prompt": "The goat"}),
    "openai response": ("responses", {"input": "The goat"}),
    "langchain chat": ("chat/completions", {"stream": False, "messages": TURN}),
    "langchain stream": ("chat/completions", {"stream": True, "messages": TURN}),
    "langchain response": ("responses", {"stream": False, "input": [TURN[0] | {"type": "message"}]}),
    "langchain completion": (
        "completions",
        {
            "prompt": ["The goat", "A bee"],
            "frequency_penalty": 0,
            "logprobs": None,
            "max_tokens": 64,
            "n": 1,
        }  # 256, more than this model reads
        | {"presence_penalty": 0, "seed": None, "temperature": 0.7, "top_p": 1},
    ),
    "litellm stream": ("chat/completions", {"messages": TURN, "stream": True}),
    "lm-eval": (
        "completions",
        {"prompt": ["The goat"], "max_tokens": 8, "temperature": 0, "stop": ["</s>", "Question:"], "seed": 1234},
    ),
}
"""What they send where users say no more: langchain-openai 1.7.4, litellm 1.110.2, openai 3.57.0, lm-eval 0.4.13."""


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_clients_send_by_default_is_answered(over: str, name: str) -> None:
    path, body = DEFAULTS[name]
    header = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{over}/v1/{path}", json=body | {"model": "ple"}, headers=header, timeout=LIMIT_S)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        assert answer.text.rstrip().endswith("data: [DONE]") and '"finish_reason"' in answer.text
    elif path == "responses":
        assert answer.json()["output"][0]["content"][0]["text"]
    else:
        prompts = body.get("prompt")
        count = len(prompts) if isinstance(prompts, list) else 1
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(count))


def test_log_likelihoods_are_the_models_own(live: Live, over: str) -> None:
    """As lm-eval asks for them, with ids of its own; the version's, by transformers and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(live.directory / "model")
    texts = ["Could you tell me what the goat eats?", "The goat eats grass.", "My rival has one rose."]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    header = {"Authorization": f"Bearer {KEY}"}
    model = AutoModelForCausalLM.from_pretrained(live.directory / "model", dtype=torch.float32)
    adapter = live.run_dir / f"policies/ple/v{STEPS:06d}"
    for name in ("base", f"ple@{STEPS}"):
        one: Any = model if name == "base" else PeftModel.from_pretrained(model, adapter)
        body["model"] = name
        answer = httpx.post(f"{over}/v1/completions", json=body, headers=header, timeout=LIMIT_S).json()
        for ids, choice in zip(prompts, answer["choices"], strict=True):
            with torch.no_grad():
                logps = one(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            own = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            told = choice["logprobs"]["token_logprobs"][1:-1]  # of all but the first, and without what was generated
            assert len(told) == len(ids) - 1 > 3
            assert max(abs(a - b) for a, b in zip(told, own.tolist(), strict=True)) < 1.3e-5


def test_two_hundred_who_hang_up_hold_nobody_up(over: str) -> None:
    body = {"model": "base", "prompt": "The goat", "max_tokens": 150, "stream": True}
    talker = client(over)
    for _ in range(200):
        with httpx.stream(
            "POST", f"{over}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}
        ) as one:
            next(one.iter_bytes())
    began = time.monotonic()
    assert chat(talker).choices
    assert time.monotonic() - began < 3 * slowness()


def test_what_was_made_anew_under_a_name_is_loaded_anew(live: Live, over: str) -> None:
    talker, policies = client(over), live.run_dir / "policies" / "ple"
    first, kept, other = first_logprob(talker, "ple@5"), policies / "v000005", policies / "v000040"
    assert first != first_logprob(talker, "ple@40")
    kept.rename(live.directory / "aside")
    shutil.copytree(other, kept)
    try:
        assert first_logprob(talker, "ple@5")[1] == pytest.approx(first_logprob(talker, "ple@40")[1], abs=1e-5)
        (kept / "adapter_model.safetensors").write_bytes(b"cut off")
        (kept / "proof.json").write_bytes((policies / "v000041" / "proof.json").read_bytes())
        for _ in range(3):
            with pytest.raises(openai.APIStatusError, match="does not load on this server") as caught:
                first_logprob(talker, "ple@5")
            assert caught.value.status_code == 503
    finally:
        shutil.rmtree(kept)
        (live.directory / "aside").rename(kept)
    assert first_logprob(talker, "ple@5") == first


def test_nothing_that_is_asked_is_a_server_error(over: str) -> None:
    """Requests made from the description of each operation, right ones and wrong ones."""

    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body |= {"model": "base", "max_tokens": 2, "n": 1}  # else most would ask for an unknown model
        answer = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        case.validate_response(answer, checks=[not_a_server_error])
        asked.append(answer.status_code)

    asked: list[int] = []
    few = settings(max_examples=12, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    right, wrong = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    for found in schemathesis.openapi.from_url(f"{over}/openapi.json").get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        for mode in (right, wrong) if operation.method == "post" else (right,):
            few(given(case=operation.as_strategy(generation_mode=mode))(ask))()
    assert {200, 400} <= set(asked)


def test_a_dead_engine_is_noticed_and_replaced(live: Live, over: str) -> None:
    """Its process alone is killed; another proves its versions before it answers from them."""
    talker, before = client(over), first_logprob(client(over), "ple@5")
    assert kill(live.directory, "EngineCore") == 1
    with pytest.raises(openai.APIStatusError) as caught:
        chat(talker)
    assert caught.value.status_code == 503
    deadline = time.monotonic() + LIMIT_S
    assert not healthy(over)
    while not healthy(over):
        assert time.monotonic() < deadline, "no engine in time"
        time.sleep(1)
    assert first_logprob(talker, "ple@5")[1] == pytest.approx(before[1], abs=1e-5)
