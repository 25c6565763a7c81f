"""The frozen model: its log-probs against the plain forward, one sequence at a time, and what its cache spares it."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.frozen_logps import CACHE_FILE, ContrastLogps, ContrastPrompts
from actors.reference import Reference, ReferenceSpec
from plumbline.data.tokenizer import read_tokenizer
from plumbline.errors import DataError, ModelError, RunError
from plumbline.models import group_logps as forward
from plumbline.models import lm_head
from plumbline.models.logp_cache import model_fingerprint
from plumbline.records import Completion, FinishReason, Generation, PolicyRef, TokenGroup

GROUPS = [
    TokenGroup([5, 6, 7], [[8, 9, 10, 2], [11, 12]]),
    TokenGroup([20, 21], [[30]]),
    TokenGroup([5, 6, 8], [[8, 9, 10, 2], [], [40, 41, 42]]),
]
PROMPTS = [
    ContrastPrompts(plain_ids=[5, 6, 7], positive_ids=[50, 51, 5, 6, 7], negative_ids=[52, 5, 6, 7]),
    ContrastPrompts(plain_ids=[20, 21], positive_ids=[50, 51, 20, 21], negative_ids=[52, 20, 21]),
]


def spec(path: Path, *, cache: Path | None = None, batch_tokens: int = 4096, dtype: Any = "float32") -> ReferenceSpec:
    where = None if cache is None else str(cache)
    return ReferenceSpec(
        model_path=str(path), dtype=dtype, device="cpu", threads=1, batch_tokens=batch_tokens, cache=where
    )


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Callable[[Sequence[int], Sequence[int]], float]:
    """Log-prob of a response given its prompt, by a model of its own and nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def logp(prompt: Sequence[int], response: Sequence[int]) -> float:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
        return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(response))

    return logp


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list[TokenGroup]]:
    """The batches that went through the model since the test began."""
    seen: list[list[TokenGroup]] = []

    def counted(model: torch.nn.Module, groups: Sequence[TokenGroup]) -> Any:
        seen.append(list(groups))
        return original(model, groups)

    original = forward.group_logps
    monkeypatch.setattr(forward, "group_logps", counted)
    return seen


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def generation(ids: Sequence[int], finish_reason: FinishReason = "stop") -> Generation:
    completion = Completion(text="", ids=list(ids), finish_reason=finish_reason)
    return Generation(key="k", ref=PolicyRef(), engine="e", completions=(completion,))


# Log-probs


@pytest.mark.parametrize("batch_tokens", [1, 12, 4096])
def test_equals_the_plain_forward(tiny_model: Path, plain: Any, batch_tokens: int) -> None:
    reference = Reference(spec(tiny_model, batch_tokens=batch_tokens))
    rows = reference.logps(GROUPS)
    assert forward.supports_shared_prefix(reference._frozen._model), (
        "inference mode does not keep it from the one forward"
    )
    expected = [[plain(group.prompt_ids, response) for response in group.response_ids] for group in GROUPS]
    assert [len(row) for row in rows] == [2, 1, 3]
    assert flat(rows) == pytest.approx(flat(expected), rel=1e-4)
    assert rows[2][1] == 0.0
    assert all(type(value) is float for value in flat(rows))
    assert max(flat(rows)[:3]) < -1 and len(set(flat(rows))) == 6


def test_the_head_in_chunks_says_the_same(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Reference(spec(tiny_model)).logps(GROUPS)
    monkeypatch.setattr(lm_head, "HEAD_LOGITS", 1)  # a row at a time, each through a checkpoint
    assert flat(Reference(spec(tiny_model)).logps(GROUPS)) == pytest.approx(flat(whole), rel=1e-5)


def test_the_model_is_frozen(tiny_model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    reference = Reference(spec(directory))
    model = reference._frozen._model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert {getattr(m, "attention_dropout", 0.0) for m in model.modules()} == {0.0}
    assert reference.logps(GROUPS) == Reference(spec(tiny_model)).logps(GROUPS)


def test_a_batch_is_cut_by_its_tokens(tiny_model: Path, forwards: list[list[TokenGroup]]) -> None:
    assert [group.tokens for group in GROUPS] == [9, 3, 10]
    reference = Reference(spec(tiny_model, batch_tokens=12))
    reference.logps(GROUPS)
    assert sorted(sum(group.tokens for group in batch) for batch in forwards) == [10, 12]


def test_nothing_to_do_is_done(tiny_model: Path, forwards: list[list[TokenGroup]]) -> None:
    reference = Reference(spec(tiny_model))
    assert reference.logps([]) == []
    assert reference.logps([TokenGroup([1], [])]) == [[]]
    assert reference.contrast_logps([], [], eos=False) == []
    assert forwards == [] and reference.counts() == {"hits": 0, "misses": 0}
    assert reference.logps([TokenGroup([1], [[], []])]) == [[0.0, 0.0]]
    with pytest.raises(DataError, match="group 0 has an empty prompt"):
        reference.logps([TokenGroup([], [[1]])])


# The cache


@pytest.mark.parametrize("kept", ["file", "memory"])
def test_the_second_time_nothing_is_computed(
    tiny_model: Path, tmp_path: Path, forwards: list[list[TokenGroup]], kept: str
) -> None:
    cache = tmp_path / "cache" if kept == "file" else None
    reference = Reference(spec(tiny_model, cache=cache))
    first = reference.logps(GROUPS)
    assert len(forwards) == 1 and reference.counts() == {"hits": 0, "misses": 6}
    assert reference.logps(GROUPS) == first
    assert len(forwards) == 1 and reference.counts() == {"hits": 6, "misses": 6}
    if cache is not None:
        assert (cache / CACHE_FILE).is_file()
        another = Reference(spec(tiny_model, cache=cache))
        assert another.logps(GROUPS) == first
        assert len(forwards) == 1 and another.counts() == {"hits": 6, "misses": 0}


def test_only_missing_responses_are_computed(tiny_model: Path, plain: Any, forwards: list[list[TokenGroup]]) -> None:
    reference = Reference(spec(tiny_model))
    reference.logps([TokenGroup([5, 6, 7], [[11, 12]]), GROUPS[1]])
    forwards.clear()
    rows = reference.logps([TokenGroup([5, 6, 7], [[8], [11, 12], [9, 9]]), GROUPS[1], GROUPS[0]])
    assert forwards == [[TokenGroup([5, 6, 7], [[8], [9, 9]]), TokenGroup([5, 6, 7], [[8, 9, 10, 2]])]]
    asked = [([5, 6, 7], [8]), ([5, 6, 7], [11, 12]), ([5, 6, 7], [9, 9]), ([20, 21], [30])]
    asked += [([5, 6, 7], [8, 9, 10, 2]), ([5, 6, 7], [11, 12])]
    assert flat(rows) == pytest.approx([plain(*pair) for pair in asked], rel=1e-4)
    assert reference.counts() == {"hits": 3, "misses": 2 + 3}


def test_what_was_computed_before_a_failure_is_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(spec(tiny_model, cache=tmp_path, batch_tokens=1))
    original, batches = forward.group_logps, iter(range(3))

    def fails_at_the_third(model: torch.nn.Module, groups: Sequence[TokenGroup]) -> Any:
        if next(batches) == 2:
            raise torch.OutOfMemoryError("full")
        return original(model, groups)

    monkeypatch.setattr(forward, "group_logps", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        reference.logps(GROUPS)
    monkeypatch.setattr(forward, "group_logps", original)
    again = Reference(spec(tiny_model, cache=tmp_path))
    again.logps(GROUPS)
    assert again.counts() == {"hits": 2, "misses": 4}


def _other_weight(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def _other_token(directory: Path) -> None:
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    one, two = list(words)[40:42]
    words[one], words[two] = words[two], words[one]
    file.write_text(json.dumps(tokenizer), "utf-8")


def _other_setting(directory: Path) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "eos_token": "<unk>"}), "utf-8")


@pytest.mark.parametrize("change", [_other_weight, _other_token, _other_setting])
def test_another_model_or_tokenizer_hits_nothing(
    tiny_model: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = Reference(spec(directory, cache=tmp_path))
    values = before.logps(GROUPS)
    assert before.fingerprint() == model_fingerprint(str(tiny_model)), "a copy is the same model"
    change(directory)
    after = Reference(spec(directory, cache=tmp_path))
    changed = after.logps(GROUPS)
    assert after.fingerprint() != before.fingerprint()
    assert after.counts() == {"hits": 0, "misses": 6}
    assert (changed != values) == (change is _other_weight)


def test_another_precision_hits_nothing(tiny_model: Path, tmp_path: Path) -> None:
    exact = flat(Reference(spec(tiny_model, cache=tmp_path)).logps(GROUPS))
    reference = Reference(spec(tiny_model, cache=tmp_path, dtype="bfloat16"))
    rough = flat(reference.logps(GROUPS))
    assert reference.counts() == {"hits": 0, "misses": 6}
    assert rough != exact and rough == pytest.approx(exact, rel=5e-2)


def test_a_damaged_cache_is_named(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / CACHE_FILE).write_text("these are no log-probs\n" * 100)
    with pytest.raises(RunError, match=f"{CACHE_FILE}: this cache of log-probs is damaged .*remove it"):
        Reference(spec(tiny_model, cache=tmp_path)).ready()


# Contrasts


@pytest.fixture(scope="module")
def eos(tiny_model: Path) -> int:
    token = read_tokenizer(str(tiny_model)).eos_token_id
    assert isinstance(token, int) and token == 2
    return token


def four(logps: ContrastLogps) -> list[float]:
    return [logps.chosen_pos, logps.chosen_neg, logps.rejected_pos, logps.rejected_neg]


@pytest.mark.parametrize("with_eos", [False, True])
def test_a_pair_is_scored_under_three_prompts(tiny_model: Path, plain: Any, eos: int, with_eos: bool) -> None:
    answers = [[8, 9, eos], [10, eos], [11, 12, 13], [14, 15, eos]]
    reasons: list[FinishReason] = ["stop", "stop", "length", "stop"]
    found = Reference(spec(tiny_model)).contrast_logps(
        PROMPTS, [generation(*pair) for pair in zip(answers, reasons, strict=True)], eos=with_eos
    )
    assert len(found) == 2
    judged = answers if with_eos else [[8, 9], [10], [11, 12, 13], [14, 15]]
    for i, (logps, prompt) in enumerate(zip(found, PROMPTS, strict=True)):
        chosen, rejected = judged[2 * i : 2 * i + 2]
        expected = [
            plain(ids, answer) for answer in (chosen, rejected) for ids in (prompt.positive_ids, prompt.negative_ids)
        ]
        assert four(logps) == pytest.approx(expected, rel=1e-4)
        whole = [plain(prompt.plain_ids, answer) for answer in answers[2 * i : 2 * i + 2]]
        assert list(logps.reference) == pytest.approx(whole, rel=1e-4), "EOS counts in these, always"
        assert len({*four(logps), *logps.reference}) == 6


def test_only_the_end_of_an_answer_that_ended_is_left_out(tiny_model: Path, plain: Any, eos: int) -> None:
    answers = [
        generation([8, eos, eos]),  # one of two
        generation([8, eos], "length"),  # cut off just there: it did not end
        generation([eos, 8, 9]),  # whatever its last token is: engines end all of them alike
        generation([8, 9], "length"),
    ]
    found = Reference(spec(tiny_model)).contrast_logps(PROMPTS, answers, eos=False)
    judged = [[8, eos], [8, eos], [eos, 8], [8, 9]]
    positives = [value for logps in found for value in (logps.chosen_pos, logps.rejected_pos)]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    expected = [plain(prompt.positive_ids, answer) for prompt, answer in zip(prompts, judged, strict=True)]
    assert positives == pytest.approx(expected, rel=1e-4)


def test_swapped_answers_swap_their_values(tiny_model: Path) -> None:
    one, two = generation([8, 9, 2]), generation([10, 11], "length")
    found = [
        Reference(spec(tiny_model)).contrast_logps(PROMPTS[:1], pair, eos=False)[0]
        for pair in ([one, two], [two, one], [one, one])
    ]
    straight, swapped, _same = found
    assert four(swapped) == pytest.approx([*four(straight)[2:], *four(straight)[:2]], rel=1e-6)
    assert swapped.reference == pytest.approx(straight.reference[::-1], rel=1e-6)
    margins = [(p - n) - (q - m) for p, n, q, m in map(four, found)]
    assert margins[1] == pytest.approx(-margins[0], rel=1e-4) and abs(margins[0]) > 0.01
    assert margins[2] == pytest.approx(0, abs=1e-5)


def test_blank_answers_are_zero(tiny_model: Path, plain: Any, eos: int) -> None:
    reference = Reference(spec(tiny_model))
    (logps,) = reference.contrast_logps(PROMPTS[:1], [generation([eos]), generation([8], "length")], eos=False)
    assert (logps.chosen_pos, logps.chosen_neg) == (0.0, 0.0)
    assert logps.rejected_pos == pytest.approx(plain(PROMPTS[0].positive_ids, [8]), rel=1e-4)
    assert logps.reference[0] == pytest.approx(plain(PROMPTS[0].plain_ids, [eos]), rel=1e-4)
    (logps,) = reference.contrast_logps(PROMPTS[:1], [generation([]), generation([], "length")], eos=True)
    assert [*four(logps), *logps.reference] == [0.0] * 6


def test_a_pair_is_one_shared_prefix_group_a_prompt(
    tiny_model: Path, forwards: list[list[TokenGroup]], eos: int
) -> None:
    reference = Reference(spec(tiny_model))
    answers = [generation([8, 9, eos]), generation([10, eos])]
    first = reference.contrast_logps(PROMPTS[:1], answers, eos=False)
    prompt = PROMPTS[0]
    assert forwards == [
        [
            TokenGroup(prompt.plain_ids, [[8, 9, eos], [10, eos]]),
            TokenGroup(prompt.positive_ids, [[8, 9], [10]]),
            TokenGroup(prompt.negative_ids, [[8, 9], [10]]),
        ]
    ]
    assert reference.counts() == {"hits": 0, "misses": 6}
    assert reference.contrast_logps(PROMPTS[:1], answers, eos=False) == first
    assert len(forwards) == 1 and reference.counts() == {"hits": 6, "misses": 6}


def test_generations_that_are_no_pairs_are_refused(tiny_model: Path) -> None:
    reference = Reference(spec(tiny_model))
    one = generation([8])
    with pytest.raises(ValueError, match="3 generations for 2 prompts; there must be two each"):
        reference.contrast_logps(PROMPTS, [one] * 3, eos=False)
    for completions in ((), one.completions * 2):
        other = Generation(key="q7", ref=PolicyRef(), engine="e", completions=completions)
        with pytest.raises(ValueError, match=f"q7: {len(completions)} completions"):
            reference.contrast_logps(PROMPTS[:1], [one, other], eos=False)
    assert reference.counts() == {"hits": 0, "misses": 0}


# Loading


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options that the model was loaded with."""
    seen: list[dict[str, Any]] = []
    original = AutoModelForCausalLM.from_pretrained

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return original(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    yield seen


def test_it_loads_safetensors_and_runs_no_foreign_code(tiny_model: Path, loaded: list[dict[str, Any]]) -> None:
    assert Reference(spec(tiny_model)).ready() > 0
    assert len(loaded) == 1
    assert loaded[0]["use_safetensors"] is True and loaded[0]["trust_remote_code"] is False


def test_what_is_no_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        Reference(spec(tmp_path / "none")).ready()
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors in it"):
        Reference(spec(directory)).ready()


@pytest.mark.parametrize("first", ["ready", "logps"])
def test_it_may_be_started_before_its_model_is_made(tiny_model: Path, tmp_path: Path, first: str) -> None:
    """A restarted one is asked without a `ready` before."""
    reference = Reference(spec(tmp_path / "later"))
    reference.warm()
    shutil.copytree(tiny_model, tmp_path / "later")
    if first == "ready":
        assert reference.ready() > 0
    assert reference.logps(GROUPS) == Reference(spec(tiny_model)).logps(GROUPS)
