"""`group_logps` against the plain forward, one sequence at a time: values and gradients. Cutting batches by tokens."""

import copy
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from plumbline.errors import DataError, ModelError
from plumbline.models import lm_head, shared_prefix
from plumbline.models.group_logps import (
    _sums,
    disable_dropout,
    group_logps,
    pack,
    pieces,
    sequence_logps,
    split_by_rank,
    supports_shared_prefix,
)
from plumbline.records import TokenGroup
from tests.varlen import Varlen

V = 97
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
GEMMA2: dict[str, Any] = {
    **LLAMA,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 3.0,
}
GEMMA2_EAGER: dict[str, Any] = {**GEMMA2, "attn_implementation": "eager"}
GPT2: dict[str, Any] = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL}

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "llama": lambda: LlamaConfig(**LLAMA),
    "gpt2": lambda: GPT2Config(**GPT2),
    "gemma2": lambda: Gemma2Config(**GEMMA2_EAGER),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=5),
    "opt": lambda: OPTConfig(
        **{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **SPECIAL}
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, max_position_embeddings=64, **SPECIAL),
    "granite": lambda: GraniteConfig(**LLAMA, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**LLAMA, logit_scale=0.25, **SPECIAL),
}
UNSUPPORTED: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": lambda: MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
    "bloom": lambda: BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),  # ALiBi, made from the mask
    "gpt_oss": lambda: GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2),  # sinks
}


def build(config: PreTrainedConfig) -> Any:
    """A random model whose attention matters: at the usual initial scale every response is nearly as likely."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def group(prompt: int, *responses: int, seed: int = 0) -> TokenGroup:
    draw = random.Random(f"{prompt} {responses} {seed}")
    ids = [[draw.randrange(V) for _ in range(length)] for length in (prompt, *responses)]
    return TokenGroup(ids[0], ids[1:])


BATCHES = {
    "K=1": [group(7, 9)],
    "K=2": [group(7, 9, 4)],
    "K=9": [group(11, 6, 1, 6, 3, 12, 2, 6, 5, 8)],
    "ragged": [group(12, 7, 1, 0, 9), group(1, 20), group(5, 0, 3), group(9)],
}


def gradients(model: nn.Module, logps: Tensor) -> list[Tensor]:
    """Of a loss in which every response counts differently."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, logps.numel()).view_as(logps)
    (weights * logps).sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [gradient.clone() for gradient in found if gradient is not None]


def assert_same(model: nn.Module, oracle: nn.Module, batch: Sequence[TokenGroup]) -> None:
    """Values and gradients of `model` by group_logps and of `oracle` by sequence_logps, to 1e-4 relative."""
    logps, tokens = group_logps(model, batch)
    expected, expected_tokens = sequence_logps(oracle, batch)
    assert torch.equal(tokens, expected_tokens) and logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-6)
    pairs = list(zip(gradients(model, logps), gradients(oracle, expected), strict=True))
    assert pairs
    for own, other in pairs:
        assert (own - other).norm() <= 1e-4 * other.norm() + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_forward(name: str) -> None:
    model = build(MODELS[name]())
    oracle = copy.deepcopy(model)
    assert supports_shared_prefix(model)
    for batch in BATCHES.values():
        assert_same(model, oracle, batch)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = build(MODELS[name]())
    oracle = copy.deepcopy(model)
    disable_dropout(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert_same(model, oracle, BATCHES["ragged"])
    assert model.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_adapter(checkpointing: bool) -> None:
    model = get_peft_model(build(Qwen2Config(**LLAMA)), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    oracle = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    assert_same(model, oracle, BATCHES["ragged"])
    adapted = group_logps(model, BATCHES["K=2"])[0]
    with model.disable_adapter():
        assert (group_logps(model, BATCHES["K=2"])[0] - adapted).abs().max() > 0.1


# The way of a GPU: one kernel a layer over the whole row, here by what stands in for it


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Varlen:
    varlen = Varlen()
    monkeypatch.setattr(shared_prefix, "varlen_attn", varlen)
    monkeypatch.setattr(shared_prefix, "_has_kernel", lambda query: True)
    return varlen


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma2"])
def test_one_kernel_equals_the_plain_forward(name: str, kernel: Varlen) -> None:
    model = build(MODELS[name]())
    assert supports_shared_prefix(model)
    for batch in BATCHES.values():
        kernel.calls = 0
        assert_same(model, copy.deepcopy(model), batch)
        twice = any(len(list(filter(None, one.response_ids))) > 1 for one in batch)
        assert kernel.calls == 2 * (1 + twice), "a layer asks once, and again in the backward pass where keys are laid"


def test_capped_scores_know_no_kernel(kernel: Varlen) -> None:
    model = build(MODELS["gemma2"]())
    assert_same(model, copy.deepcopy(model), BATCHES["ragged"])
    assert kernel.calls == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_one_kernel_under_gradient_checkpointing(name: str, reentrant: bool, kernel: Varlen) -> None:
    model = build(MODELS[name]())
    oracle = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert_same(model, oracle, BATCHES["ragged"])


def test_laid_keys_are_not_kept_for_the_backward_pass(kernel: Varlen) -> None:
    model = build(Qwen2Config(**LLAMA))
    supports_shared_prefix(model)
    batch = [group(23, *[3] * 8)]
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(max(tensor.shape, default=0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        group_logps(model, batch)
    laid, row = 23 * 8 + 3 * 8, 23 + 3 * 8
    assert row in kept and laid not in kept


def test_a_gathered_rows_gradients_are_summed_in_float32() -> None:
    tensor = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    laid = shared_prefix.Laid.apply(tensor, torch.tensor([0] * 65 + [1]))
    laid.backward(torch.tensor([[1.0], *[[2.0**-9]] * 64, [3.0]], dtype=torch.bfloat16))
    assert tensor.grad is not None and tensor.grad.tolist() == [[1.125], [3.0]]


def test_sums_by_hand() -> None:
    groups = [TokenGroup([1], [[5, 6], [], [7]]), TokenGroup([1], [[8]]), TokenGroup([1], [])]
    sums, tokens = _sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), groups)
    assert sums.tolist() == [[3, 0, 4], [8, 0, 0], [0, 0, 0]]
    assert tokens.tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_responses_see_their_prompt_and_nothing_else() -> None:
    model = build(Qwen2Config(**LLAMA))
    first, second = group(6, 5, 5), group(8, 4)
    logps = group_logps(model, [first, second])[0]
    other = TokenGroup(first.prompt_ids, [[3, 1, 4, 1, 5], first.response_ids[1]])
    changed = group_logps(model, [other, second])[0]
    assert changed[0, 0] != logps[0, 0]
    torch.testing.assert_close(changed[0, 1], logps[0, 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(changed[1], logps[1], rtol=1e-6, atol=0)


def test_bfloat16_is_near_float32() -> None:
    model = build(Qwen2Config(**LLAMA))
    expected = sequence_logps(copy.deepcopy(model), BATCHES["ragged"])[0]
    logps, tokens = group_logps(model.bfloat16(), BATCHES["ragged"])
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=3e-2, atol=1e-2)
    assert supports_shared_prefix(model) and tokens.tolist() == [[7, 1, 0, 9], [20, 0, 0, 0], [0, 3, 0, 0], [0] * 4]


def test_absent_and_empty_responses_are_zero_and_can_be_trained_on() -> None:
    model = build(Qwen2Config(**LLAMA))
    logps, tokens = group_logps(model, [group(4, 0), group(3, 0, 0)])
    assert logps.tolist() == tokens.tolist() == [[0, 0], [0, 0]]
    assert all(gradient.abs().sum() == 0 for gradient in gradients(model, logps))


def test_wrong_groups_are_refused() -> None:
    model = build(Qwen2Config(**LLAMA))
    for compute in (group_logps, sequence_logps):
        with pytest.raises(DataError, match="group 1 has an empty prompt"):
            compute(model, [group(3, 2), group(0, 2)])
        with pytest.raises(DataError, match="no response"):
            compute(model, [])
    with pytest.raises(ModelError, match="not a transformers model"):
        group_logps(nn.Linear(1, 1), [group(3, 2)])


# A row holds no padding, and the head sees scored positions only, a chunk at a time


def test_a_row_holds_every_token_once() -> None:
    model = build(Qwen2Config(**LLAMA))
    supports_shared_prefix(model)
    shapes: list[tuple[int, ...]] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    group_logps(model, BATCHES["ragged"] + BATCHES["K=9"])
    computed = sum(g.tokens for g in BATCHES["ragged"] + BATCHES["K=9"])
    assert computed == (12 + 17) + (1 + 20) + (5 + 3) + 9 + (11 + 49) == 127
    assert shapes == [(1, 127, 32)]


class CountingLinear(nn.Linear):
    """Notes how many rows each call projects."""

    rows: list[int]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows = []

    def forward(self, input: Tensor) -> Tensor:
        self.rows.append(input.shape[:-1].numel())
        return super().forward(input)


def test_the_head_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Qwen2Config(**LLAMA, tie_word_embeddings=False))
    oracle = copy.deepcopy(model)
    head = CountingLinear(32, V, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.set_output_embeddings(head)
    supports_shared_prefix(model)
    head.rows = []
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape[0] if tensor.ndim == 2 and tensor.shape[1] == V else 0)
        return tensor

    monkeypatch.setattr(lm_head, "HEAD_LOGITS", 8 * V)  # 8 rows at once; the ragged batch scores 40
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = group_logps(model, BATCHES["ragged"])[0]
    assert head.rows == [8] * 5
    assert sum(saved) == 0  # no logits wait for the backward pass
    own = gradients(model, logps)
    assert head.rows == [8] * 10 and "forward" not in vars(head)
    expected = sequence_logps(oracle, BATCHES["ragged"])[0]
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-6)
    for one, other in zip(own, gradients(oracle, expected), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


# What the model is used for elsewhere goes on as before


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mistral"])
def test_generate_and_plain_forward_are_untouched(name: str, tmp_path: Path) -> None:
    model = build(MODELS[name]())
    fresh = copy.deepcopy(model)
    group_logps(model, BATCHES["K=2"])
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
        fresh(input_ids=ids, attention_mask=mask).logits[mask.bool()],
    )
    answers = [
        m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, fresh)
    ]
    assert torch.equal(answers[0], answers[1])
    model.save_pretrained(tmp_path)
    assert "plumbline" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == V


def test_another_attention_set_later_is_replaced_again() -> None:
    model = build(Qwen2Config(**LLAMA))
    oracle = copy.deepcopy(model)
    group_logps(model, BATCHES["K=2"])
    model.set_attn_implementation("eager")
    assert_same(model, oracle, BATCHES["K=9"])


def test_softcapped_scores_are_capped_whatever_was_asked_for() -> None:
    capped = build(Gemma2Config(**GEMMA2_EAGER))
    model = build(Gemma2Config(**GEMMA2))  # SDPA, which leaves the cap out
    assert model.config._attn_implementation == "sdpa"
    assert_same(model, capped, BATCHES["K=9"])
    expected = sequence_logps(capped, BATCHES["K=9"])[0]
    torch.testing.assert_close(sequence_logps(model, BATCHES["K=9"])[0], expected, rtol=1e-4, atol=1e-6)


# Models that cannot


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_mixers_fall_back_with_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(UNSUPPORTED[name]()).train()
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, logger="plumbline.models.packed"):
        assert_same(model, copy.deepcopy(model), BATCHES["ragged"])
        group_logps(model, BATCHES["K=1"])
    warnings = [record.message for record in caplog.records if record.name == "plumbline.models.packed"]
    assert len(warnings) == 1 and warnings[0].startswith(f"{type(model).__name__}: no shared-prefix forward")
    assert model.config._attn_implementation == before and model.training
    assert not supports_shared_prefix(model)


def test_a_window_that_only_the_mask_knows_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    config = Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=16, max_window_layers=0)
    model = build(config)
    assert supports_shared_prefix(model)
    hidden = build(copy.deepcopy(config))
    for layer in hidden.model.layers:
        layer.self_attn.sliding_window = None  # wider than the probe: its values alone would not tell
    assert not supports_shared_prefix(hidden)
    assert "only its mask knows" in caplog.text


def test_a_learned_prompt_falls_back_and_is_right() -> None:
    base = build(Qwen2Config(**LLAMA))
    plain = group_logps(base, BATCHES["K=2"])[0]
    model = get_peft_model(base, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).eval()
    assert not supports_shared_prefix(model)
    logps = group_logps(model, BATCHES["K=2"])[0]
    ids = torch.tensor([BATCHES["K=2"][0].prompt_ids + BATCHES["K=2"][0].response_ids[0]])
    learned = model.get_prompt(batch_size=1)
    logits = base(inputs_embeds=torch.cat([learned, base.get_input_embeddings()(ids)], dim=1)).logits[0]
    expected = logits[3 + 6 : 3 + 15].log_softmax(-1).gather(1, ids[0, 7:, None]).sum()
    torch.testing.assert_close(logps[0, 0], expected, rtol=1e-4, atol=1e-5)
    assert (logps - plain).abs().max() > 1e-3


def test_dropout_is_refused_and_can_be_turned_off() -> None:
    model = build(GPT2Config(**GPT2)).train()  # .1 everywhere by default
    with pytest.raises(ModelError, match="disable_dropout"):
        group_logps(model, BATCHES["K=2"])
    disable_dropout(model)
    assert_same(model, copy.deepcopy(model).eval(), BATCHES["K=2"])


# Batches by tokens


def sizes(groups: Sequence[TokenGroup], bins: list[list[int]]) -> list[int]:
    assert sorted(index for indices in bins for index in indices) == list(range(len(groups)))
    return [sum(groups[index].tokens for index in indices) for indices in bins]


def test_pack_by_hand() -> None:
    groups = [group(1, size - 1) for size in (5, 3, 4, 2, 12, 6)]
    # 12 is alone; the others are 20 tokens: 6 + 4 and 5 + 3 + 2 fill two of 10 exactly
    assert pack(groups, 10) == [[0, 1, 3], [2, 5], [4]]
    # with 11 there is no need to be exact: 6, 5, 4, 3, 2, each to the emptier, is 6 + 3 + 2 and 5 + 4
    assert pack(groups, 11) == [[0, 2], [1, 3, 5], [4]]
    assert sizes(groups, pack(groups, 11)) == [9, 11, 12]


@pytest.mark.parametrize("budget", [1, 40, 150, 10**6])
def test_pack_keeps_to_the_budget(budget: int) -> None:
    draw = random.Random(1)
    groups = [group(draw.randint(1, 40), draw.randint(0, 30), draw.randint(0, 30)) for _ in range(60)]
    bins = pack(groups, budget)
    assert pack(groups, budget) == bins and all(bins)
    for indices, size in zip(bins, sizes(groups, bins), strict=True):
        assert size <= budget or len(indices) == 1
    if budget == 150:
        assert len(bins) <= sum(g.tokens for g in groups) / 150 + 2
    if budget == 10**6:
        assert bins == [list(range(60))]


def test_pack_edges() -> None:
    assert pack([], 10) == []
    assert pack([group(20, 1)], 10) == [[0]]
    with pytest.raises(ValueError, match="token_budget is 0"):
        pack([], 0)


def test_pieces_by_hand() -> None:
    """A prompt of 2 in a budget of 8 leaves 6 for responses, in their order; blank ones may stand anywhere."""
    ids = [[1] * n for n in (0, 4, 2, 0, 3, 9, 0, 1)]
    cut = pieces(TokenGroup([7, 8], ids), 8)
    assert [[len(r) for r in piece.response_ids] for piece in cut] == [[0, 4, 2, 0], [3], [9, 0], [1]]
    assert all(piece.prompt_ids == [7, 8] for piece in cut)
    beside = [{"token_type_ids": row} for row in ids]
    with_beside = pieces(TokenGroup([7, 8], ids, beside), 8)
    assert [piece.beside for piece in with_beside] == [beside[:4], beside[4:5], beside[5:7], beside[7:]]


def test_a_group_within_the_budget_is_one_piece() -> None:
    group = TokenGroup([7, 8], [[1, 2], [3], []])
    assert pieces(group, 5) == [group]
    assert [len(piece.response_ids) for piece in pieces(group, 1)] == [1, 2]


def test_split_by_rank_balances_tokens() -> None:
    groups = [group(1, size - 1) for size in (9, 2, 7, 4, 4, 2)]
    # 9 | 7, 7 + 4, 9 + 4, 11 + 2, and at 13 | 13 the lower rank takes the last 2
    assert split_by_rank(groups, 2) == [[0, 4, 5], [1, 2, 3]]
    assert sizes(groups, split_by_rank(groups, 2)) == [15, 13]
    assert split_by_rank(groups[:1], 3) == [[0], [], []]
    assert split_by_rank([], 2) == [[], []]
    with pytest.raises(ValueError, match="world_size is 0"):
        split_by_rank(groups, 0)
