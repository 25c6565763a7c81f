"""What needs a CUDA device: shared-prefix log-probs in bfloat16, and a vLLM engine proved against them there."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from plumbline.config.data import Model
from plumbline.config.pipelines import Dlma, Ple
from plumbline.data.dataset import read_prompts
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.data.tokenizer import load_tokenizer
from plumbline.models import classifier, shared_prefix
from plumbline.models.group_logps import group_logps, sequence_logps
from plumbline.records import Sample, TokenGroup
from tests.tiny import engine_spec, make_prompts, make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def groups_of(directory: Path) -> list[TokenGroup]:
    tokenizer = load_tokenizer(str(directory / "model"))
    prompts = read_prompts(str(make_prompts(directory / "prompts.jsonl", 8)))
    return [
        TokenGroup(render(tokenizer, p.messages), [encode_response(tokenizer, p.target or "x"), [5, 6, 7]])
        for p in prompts
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learner_without_its_adapter_is_the_base(tmp_path: Path, dtype: Any) -> None:
    from actors.learning.frozen import without_adapter
    from actors.learning.policy import LearnedPolicy, load_model

    origin = Model.model_validate({"path": str(make_tiny_model(tmp_path / "model"))})
    groups = groups_of(tmp_path)
    section = Dlma.model_validate({"type": "dlma", "learner": {"gradient_checkpointing": True}})
    policy = LearnedPolicy(section, origin, dtype, "cuda", seed=0)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter.add_(0.1)
        learnt = group_logps(policy.model, groups)[0]
        base = group_logps(load_model(origin, dtype).to("cuda").eval(), groups)[0]
    with without_adapter(policy.model):
        assert torch.allclose(group_logps(policy.model, groups)[0], base, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(learnt, base, atol=0.5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_group_logps_match_one_sequence_at_a_time(tmp_path: Path, dtype: str, tolerance: float) -> None:
    from actors.learning.policy import load_model

    make_tiny_model(tmp_path / "model")
    model = load_model(Model.model_validate({"path": str(tmp_path / "model")}), dtype).to("cuda").eval()
    groups = groups_of(tmp_path)
    with torch.no_grad():
        packed, tokens = group_logps(model, groups)
        plain, plain_tokens = sequence_logps(model, groups)
    assert torch.equal(tokens, plain_tokens)
    assert torch.allclose(packed / tokens, plain / tokens, atol=tolerance)


@pytest.mark.parametrize("window", [None, 16])
def test_one_kernel_has_the_gradients_of_many_calls(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """GQA, a prompt that many answers share, a window; against the way of a CPU, in bfloat16 both."""
    torch.manual_seed(0)
    layout = shared_prefix.Layout([(37, [11, 1, 29, 0, 5]), (1, [64]), (50, [])])
    query, key, value = (torch.randn(1, heads, sum(layout.segments), 64, device="cuda") for heads in (8, 2, 2))
    found = []
    for kernel in (True, False):
        monkeypatch.setattr(shared_prefix, "_has_kernel", lambda query, kernel=kernel: kernel)
        own = q, k, v = [tensor.bfloat16().requires_grad_() for tensor in (query, key, value)]
        out = shared_prefix._attend_row(q, k, v, layout, sliding_window=window)
        (out.float() * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
        found.append([out, *(tensor.grad for tensor in own)])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        assert (one - other).float().norm() < 2e-2 * other.float().norm()


def test_bfloat16_on_a_gpu_takes_the_kernel() -> None:
    query = torch.zeros(1, 8, 4, 64, device="cuda")
    assert shared_prefix._has_kernel(query.bfloat16()) and not shared_prefix._has_kernel(query)


def test_a_packed_classifier_in_bfloat16_is_the_padded_one() -> None:
    """Logits and gradients, through the kernel, of texts of unlike lengths and grouped-query attention."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 997,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "num_labels": 1,
        "initializer_range": 0.06,
    }
    model: Any = LlamaForSequenceClassification(LlamaConfig(**shape))
    model.to("cuda", torch.bfloat16).eval()
    texts = [[(7 * i + 11 * n) % 996 + 1 for i in range(n)] for n in (5, 1, 300, 64, 17)]
    assert classifier.packs_texts(model)
    found = []
    for logits_of in (classifier.classifier_logits, classifier._padded_logits):
        model.zero_grad()
        logits = logits_of(model, texts)
        (logits * torch.linspace(-1, 1, len(texts), device="cuda")[:, None]).sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        assert (one - other).float().norm() < 5e-2 * other.float().norm()


@pytest.mark.parametrize("gpus", [1, 2])
def test_vllm_on_a_gpu_answers_as_the_learner(tmp_path: Path, gpus: int) -> None:
    pytest.importorskip("vllm")
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs are not here")
    from actors.engines.start import start_engine
    from actors.learning.policy import LearnedPolicy
    from actors.proof import TOLERANCE

    model = make_tiny_model(tmp_path / "model")
    groups = groups_of(tmp_path)
    policy = LearnedPolicy(Ple(type="ple"), Model.model_validate({"path": str(model)}), "bfloat16", "cuda", 0)
    expected = policy.probe(groups)
    spec = engine_spec(model, dtype="bfloat16", device="cuda", memory_share=0.3, tensor_parallel=gpus)

    async def measure() -> list[float]:
        engine = start_engine("vllm", spec)
        try:
            scored = [
                await engine.logprobs(g.prompt_ids, response, adapter=None)
                for g in groups
                for response in g.response_ids
            ]
            return [sum(s) / len(s) for s in scored]
        finally:
            await engine.close()

    measured = asyncio.run(measure())
    assert max(abs(a - b) for a, b in zip(measured, expected, strict=True)) < TOLERANCE["bfloat16"]


def test_an_engine_reads_whole_weights_in_the_memory_of_its_card(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from actors.engines.start import start_engine
    from actors.learning.policy import LearnedPolicy
    from plumbline.models.digest import digest
    from plumbline.models.ipc import Shelf

    model = make_tiny_model(tmp_path / "model")
    section = Ple.model_validate({"type": "ple", "policy": {"type": "full"}})
    policy = LearnedPolicy(section, Model(path=str(model)), "bfloat16", "cuda", 0)
    groups = [TokenGroup(group.prompt_ids, group.response_ids[:1]) for group in groups_of(tmp_path)[:4]]
    shelf = Shelf(torch.device("cuda", torch.cuda.current_device()))

    async def go() -> None:
        engine = start_engine(
            "vllm", engine_spec(model, dtype="bfloat16", device="cuda", memory_share=0.3, max_adapters=0)
        )
        try:
            for _ in range(3):  # more often than a handle that is used up
                with torch.no_grad():
                    for parameter in policy.trainable:
                        parameter.add_(torch.randn_like(parameter), alpha=0.02)
                expected = {name: digest(p) for name, p in policy.model.named_parameters()}
                shared = shelf.lay(policy.model.named_parameters())
                assert await engine.load_weights(str(model), shared), "it has read the files"
                [held] = await engine.digests(list(expected), adapter=None)
                assert held == expected
                for group, mean in zip(groups, policy.probe(groups), strict=True):
                    logps = await engine.logprobs(group.prompt_ids, group.response_ids[0], adapter=None)
                    assert sum(logps) / len(logps) == pytest.approx(mean, abs=0.25)
            elsewhere = replace(shelf.lay(policy.model.named_parameters()), card="another")
            assert not await engine.load_weights(str(model), elsewhere)
        finally:
            await engine.close()

    asyncio.run(go())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_base_in_four_bits_learns_on_a_gpu(tmp_path: Path, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    from actors.learning.objectives import SftObjective
    from actors.learning.policy import LearnedPolicy
    from actors.learning.strategy import TorchStrategy, portion_of
    from plumbline.config.pipelines import Sft
    from plumbline.runs.checkpoint import Checkpoint, write_manifest, write_pieces

    model = make_tiny_model(tmp_path / "model")
    learner = {"quantize": "nf4", "optimizer": optimizer}
    section = Sft.model_validate({"policy": {"type": "lora"}, "learner": learner})
    policy = LearnedPolicy(section, Model(path=str(model)), "bfloat16", "cuda", 0)
    strategy = TorchStrategy(policy, section.learner, "cuda", world=1)
    portion = portion_of([Sample(group=group) for group in groups_of(tmp_path)], 1, 0, 40)
    losses = [
        sum(result.loss.item() * result.share for result in strategy.update(SftObjective(), portion, 1e-2).results)
        for _ in range(20)
    ]
    assert losses[-1] < losses[0] - 1
    other = TorchStrategy(
        LearnedPolicy(section, Model(path=str(model)), "bfloat16", "cuda", 0), section.learner, "cuda", 1
    )
    write_manifest(tmp_path, 1, [write_pieces(tmp_path, 1, strategy.state()).name], {})
    with Checkpoint.opened(tmp_path, 1) as saved:
        other.load(saved)
    found = [one.update(SftObjective(), portion, 1e-2).results[0].loss.item() for one in (strategy, other)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
