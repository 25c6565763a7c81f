"""ZeRO on processes of this machine: models that are never whole on a worker, and sums of gradients in float32."""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.learning.make_strategy import make_cut, make_strategy
from actors.learning.objectives import SftObjective
from actors.learning.policy import LearnedPolicy, load_model
from actors.learning.strategy import MicroBatch, Portion, TorchStrategy
from plumbline.config.data import Model
from plumbline.config.learner import Learner
from plumbline.config.pipelines import RewardModel, Sft
from plumbline.errors import ModelError
from plumbline.models.loading import Cut, write_shards
from plumbline.records import Sample, TokenGroup
from plumbline.runs.checkpoint import Checkpoint, write_manifest, write_pieces
from tests.tiny import make_tiny_model
from tests.workers import together

ZERO_3 = Learner.model_validate({"strategy": "deepspeed", "zero": 3})
DOWN, EMBEDDINGS, HEAD = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def zero(stage: int, policy: str = "full", **learner: Any) -> Sft:
    settings = {"strategy": "deepspeed", "zero": stage, **learner}
    return Sft.model_validate({"policy": {"type": policy}, "learner": settings})


# Models that come cut


def changed(model: Path, copy: Path, weights: dict[str, Tensor | None], **config: Any) -> str:
    """A copy of a model with other weights, or without some, and other settings."""
    from transformers import AutoConfig

    shutil.copytree(model, copy)
    kept = {**load_file(model / "model.safetensors"), **weights}
    save_file({name: weight for name, weight in kept.items() if weight is not None}, copy / "model.safetensors")
    AutoConfig.from_pretrained(model, **config).save_pretrained(copy)
    return str(copy)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights, and buffers, by all names."""
    import deepspeed

    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert weight.numel() == 0 and hasattr(weight, "ds_id"), f"{name} is whole"
        with deepspeed.zero.GatheredParameters([weight]):
            found[name] = weight.detach().clone()
    return found


def refused(path: str, classifier: bool, cut: Cut | None) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(Model(path=path), "float32", classifier=classifier, cut=cut)
    return str(caught.value)


def assert_cut_as_whole(paths: dict[str, str], damaged: list[str]) -> None:
    """On each worker: a model that is cut is, put together, the one that is read whole; or is refused as that is."""
    cut = make_cut(ZERO_3, "cpu")
    for name, path in paths.items():
        for classifier in (False, True):
            torch.manual_seed(0)
            whole = load_model(Model(path=path), "bfloat16", classifier=classifier)
            torch.manual_seed(0)
            found = gathered(load_model(Model(path=path), "bfloat16", classifier=classifier, cut=cut))
            expected = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
            assert set(found) == set(expected)
            for key, value in expected.items():
                assert found[key].dtype == value.dtype and torch.equal(found[key], value), (name, classifier, key)
            if not classifier:
                torch.manual_seed(0)
                tied = load_model(Model(path=path), "float32", cut=cut)
                assert (tied.lm_head.weight is tied.model.embed_tokens.weight) == (
                    whole.lm_head.weight is whole.model.embed_tokens.weight
                ), name
    for path in damaged:
        for classifier in (False, True):
            assert refused(path, classifier, cut) == refused(path, classifier, None)


def test_a_model_that_comes_cut_is_the_one_that_its_files_have(model: Path, tmp_path: Path) -> None:
    """Also where the head is tied, where files have a tied head of its own, and where a new head is drawn."""
    kept = load_file(model / "model.safetensors")
    nan = kept[EMBEDDINGS].clone()
    nan[3, 5] = torch.nan
    tied = {"tie_word_embeddings": True}
    paths = {
        "untied": str(model),
        "tied": changed(model, tmp_path / "tied", {HEAD: None}, **tied),
        "both, equal": changed(model, tmp_path / "equal", {HEAD: kept[EMBEDDINGS].clone()}, **tied),
        "both, unlike": changed(model, tmp_path / "unlike", {}, **tied),
    }
    damaged = [
        changed(model, tmp_path / "lacks", {DOWN: None}),
        changed(model, tmp_path / "unknown", {"model.foo": torch.zeros(2)}),
        changed(model, tmp_path / "shape", {EMBEDDINGS: kept[EMBEDDINGS][:-3].clone()}),
        changed(model, tmp_path / "nan", {EMBEDDINGS: nan}),
    ]
    together(2, assert_cut_as_whole, paths, damaged)


def assert_strategies_agree(path: str, sections: list[Any]) -> None:
    """What is trained, under ZeRO 3, is what a plain worker would train, weight by weight; so are random models."""
    for section in sections:
        for origin in (Model(path=path), Model(init={"model_type": "llama", **SMALL}, tokenizer=path)):
            plain = LearnedPolicy(section, origin, "bfloat16", "cpu", 3)
            policy = LearnedPolicy(section, origin, "bfloat16", "cpu", 3, make_cut(section.learner, "cpu"))
            strategy = make_strategy(policy, section.learner, "bfloat16", "cpu", 2)
            found, expected = dict(strategy.weights(trainable=False)), dict(plain.model.named_parameters())
            assert list(found) == list(expected)
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())
            trained = [name for name, _ in strategy.weights(trainable=True)]
            assert trained == [name for name, _ in plain.named_trainable()]
            for (name, one), other in zip(plain.model.named_buffers(), policy.model.buffers(), strict=True):
                assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other), name


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_what_is_trained_is_what_a_plain_worker_trains(model: Path) -> None:
    learner = {"strategy": "deepspeed", "zero": 3}
    classifier = RewardModel.model_validate({"type": "reward", "learner": learner})
    together(2, assert_strategies_agree, str(model), [zero(3), zero(3, "lora"), classifier])


def large_model(directory: Path, tokenizer: Path) -> int:
    """A model of 300 million weights in several files; returns how many exactly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tokenizer, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = LlamaConfig(**LARGE, tie_word_embeddings=False, pad_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        weights = dict(LlamaForCausalLM(config).named_parameters())
    config.save_pretrained(directory)
    made = ((name, torch.empty(w.shape, dtype=torch.bfloat16).normal_(0, 0.02)) for name, w in weights.items())
    write_shards(directory, made, 250 * 2**20)
    return sum(weight.numel() for name, weight in weights.items() if name != HEAD)


LARGE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
}


def resident(kind: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process that are in memory, or were at most since `peak_from_now`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def peak_from_now() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peaks(small: str, large: str, cut: bool) -> tuple[int, int]:
    """Bytes that this worker needs at most to load the model, and to make what trains it, beyond what a process needs
    that has done so with a small one."""
    section = RewardModel.model_validate({"type": "reward", "learner": {"strategy": "deepspeed", "zero": 3}})

    def load(path: str) -> LearnedPolicy:
        how = make_cut(section.learner, "cpu") if cut else None
        return LearnedPolicy(section, Model(path=path), "float32", "cpu", 0, how)

    make_strategy(load(small), section.learner, "float32", "cpu", dist.get_world_size())
    before = peak_from_now()
    policy = load(large)
    loading = resident("VmHWM") - before
    make_strategy(policy, section.learner, "float32", "cpu", dist.get_world_size())
    return loading, resident("VmHWM") - before


@pytest.mark.slow
def test_no_worker_ever_needs_more_than_its_share(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of 300 million weights on four workers; the share is of weights, then of masters and gradients too."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))  # what is freed is given back, not kept by the allocator
    world = 4
    share = 4 * large_model(tmp_path / "large", model) / world
    for loading, making in together(world, peaks, str(model), str(tmp_path / "large"), True):
        assert 0.9 * share < loading < 1.2 * share
        assert 0.9 * 3 * share < making < 1.2 * 3 * share


# Sums of gradients


class OneLayer:
    """What a strategy needs of a policy, around a layer whose gradient is 1 for each of four weights."""

    generates = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = nn.Linear(4, 1, bias=False, dtype=dtype)

    def named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()


class Summed:
    """A loss that is what the layer makes of ones."""

    def __init__(self, dtype: str) -> None:
        self._ones = torch.ones(1, 4, dtype=getattr(torch, dtype))

    def forward(self, model: Any, groups: Sequence[TokenGroup]) -> Any:
        return model(self._ones), torch.ones(1, 1)

    def loss(self, scores: Any, samples: Sequence[Sample]) -> Any:
        return scores[0].sum(), {}


def portion(micros: list[MicroBatch]) -> Portion:
    """As many forward passes as micro-batches."""
    return Portion(micro_batches=micros, filler=TokenGroup([5], [[6]]), drafts=0, passes=len(micros))


def norm_of_sums(stage: int, dtype: Literal["float32", "bfloat16"], shares: list[list[float]]) -> float:
    """The norm of the sum of gradients of these sizes, each worker's."""
    policy: Any = OneLayer(getattr(torch, dtype))
    strategy = make_strategy(policy, zero(stage).learner, dtype, "cpu", dist.get_world_size())
    micros = [MicroBatch(samples=[], share=share, passes=[[]]) for share in shares[dist.get_rank()]]
    return strategy.update(Summed(dtype), portion(micros), 1e-3).grad_norm


def norms_of_sums(shares: list[list[list[float]]]) -> dict[tuple[int, str, int], float]:
    kinds: list[Literal["float32", "bfloat16"]] = ["float32", "bfloat16"]
    return {
        (stage, dtype, i): norm_of_sums(stage, dtype, one)
        for stage in (1, 2, 3)
        for dtype in kinds
        for i, one in enumerate(shares)
    }


def test_gradients_are_summed_in_float32() -> None:
    """Of many small ones after a large one, and of a small one of another worker, bfloat16 would keep nothing."""
    small = 2.0**-9
    many = [[1.0, *[small] * 64], [1.0, *[small] * 64]]
    across = [[1.0], [small]]
    for norms in together(2, norms_of_sums, [many, across]):
        for (stage, dtype, i), norm in norms.items():
            expected = 2 * ((2.25, 1 + small)[i])
            assert norm == pytest.approx(expected, rel=1e-4), (stage, dtype, i)


class InfiniteOnOne(Summed):
    """On the first worker the loss is infinite, and its gradient is not."""

    def loss(self, scores: Any, samples: Sequence[Sample]) -> Any:
        return scores[0].sum() + (math.inf if dist.get_rank() == 0 else 0), {}


def left_out(dtype: Literal["float32", "bfloat16"]) -> dict[int, float]:
    """The norm of an update that is left out between two others, by stage, 0 being plain torch."""
    found = {}
    for stage in (0, 1, 2, 3):
        policy: Any = OneLayer(getattr(torch, dtype))
        learner = zero(stage).learner if stage else Sft.model_validate({}).learner
        strategy = make_strategy(policy, learner, dtype, "cpu", dist.get_world_size())
        micros = portion([MicroBatch(samples=[], share=0.5, passes=[[]])])
        weights, norms = [], []
        for objective in (Summed(dtype), InfiniteOnOne(dtype), Summed(dtype)):
            norms.append(strategy.update(objective, micros, 1e-2).grad_norm)
            weights.append([value for _, one in strategy.weights(trainable=True) for value in one.flatten().tolist()])
        assert norms[0] == norms[2] == pytest.approx(2.0, rel=1e-3)
        assert weights[0] == weights[1] != weights[2], stage
        found[stage] = norms[1]
    return found


def test_a_step_with_a_loss_that_is_not_finite_is_left_out_by_all_workers() -> None:
    for dtype in ("float32", "bfloat16"):
        one, other = together(2, left_out, dtype)
        for stage in (0, 1, 2, 3):
            assert not math.isfinite(one[stage]) and not math.isfinite(other[stage])


# In bfloat16


RNG = Random(0)
GROUPS = [TokenGroup(RNG.choices(range(5, 60), k=6), [RNG.choices(range(5, 60), k=8)]) for _ in range(8)]
HALVES = [[Sample(group=group) for group in half] for half in (GROUPS[:4], GROUPS[4:])]


def half(number: int) -> MicroBatch:
    samples = HALVES[number]
    return MicroBatch(samples=samples, share=0.5, passes=[[sample.group for sample in samples]])


def losses_after(path: str, updates: int) -> dict[int, float]:
    """This worker's half of the mean loss of the last update, by stage; each has one of the two micro-batches."""
    found = {}
    rank = dist.get_rank()
    for stage in (1, 2, 3):
        section = zero(stage, weight_decay=0.1)
        policy = LearnedPolicy(section, Model(path=path), "bfloat16", "cpu", 0, make_cut(section.learner, "cpu"))
        strategy = make_strategy(policy, section.learner, "bfloat16", "cpu", 2)
        mine = portion([half(rank)])
        losses = [strategy.update(SftObjective(), mine, 5e-5).results[0].loss for _ in range(updates)]
        found[stage] = 0.5 * losses[-1].item()
    return found


def saved_and_gone_on_from(path: str, root: Path) -> None:
    """A checkpoint of each stage goes on as the strategy itself does, to the last bit."""
    mine = portion([half(dist.get_rank())])
    for stage in (1, 2, 3):
        section = zero(stage)
        one, other = (
            make_strategy(
                LearnedPolicy(section, Model(path=path), "bfloat16", "cpu", 0, make_cut(section.learner, "cpu")),
                section.learner,
                "bfloat16",
                "cpu",
                2,
            )
            for _ in range(2)
        )
        for _ in range(3):
            one.update(SftObjective(), mine, 1e-4)
        files = [""] * 2
        dist.all_gather_object(files, write_pieces(root, stage, one.state()).name)
        if dist.get_rank() == 0:
            write_manifest(root, stage, files, {})
        dist.barrier()
        with Checkpoint.opened(root, stage) as saved:
            other.load(saved)
        for (name, weight), (_, again) in zip(one.weights(trainable=True), other.weights(trainable=True), strict=True):
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, again), (stage, name)
        first, second = (s.update(SftObjective(), mine, 1e-4) for s in (one, other))
        assert first.results[0].loss.item() == second.results[0].loss.item()
        assert first.grad_norm == second.grad_norm
        for (name, weight), (_, again) in zip(one.weights(trainable=True), other.weights(trainable=True), strict=True):
            assert torch.equal(weight, again), (stage, name)


def test_a_bfloat16_checkpoint_is_of_the_masters(model: Path, tmp_path: Path) -> None:
    """And a plain worker goes on from any."""
    together(2, saved_and_gone_on_from, str(model), tmp_path)
    section = Sft.model_validate({})
    for stage in (1, 2, 3):
        plain = TorchStrategy(
            LearnedPolicy(section, Model(path=str(model)), "bfloat16", "cpu", 0), section.learner, "cpu", 1
        )
        with Checkpoint.opened(tmp_path, stage) as saved:
            assert len(list((tmp_path / f"step-{stage:06d}").glob("*.safetensors"))) == 2
            plain.load(saved)
            for name, piece in plain.state().items():
                assert torch.equal(piece.values, saved.whole(name)), (stage, name)
                assert piece.values.dtype == torch.float32, (stage, name)
            rounded = [
                torch.equal(w.float(), saved.whole(f"model.{name}")) for name, w in plain.weights(trainable=True)
            ]
            assert not all(rounded), "what is saved is finer than what the model computes with"


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(model: Path) -> None:
    """A hundred updates at a learning rate whose steps round to nothing in bfloat16."""
    section = Sft.model_validate({"learner": {"weight_decay": 0.1}})
    plain = TorchStrategy(
        LearnedPolicy(section, Model(path=str(model)), "float32", "cpu", 0), section.learner, "cpu", 1
    )
    both = portion([half(0), half(1)])
    means = [
        sum(0.5 * result.loss.item() for result in plain.update(SftObjective(), both, 5e-5).results) for _ in range(100)
    ]
    assert means[-1] < 0.9 * means[0]
    one, other = together(2, losses_after, str(model), 100)
    for stage in (1, 2, 3):
        assert one[stage] + other[stage] == pytest.approx(means[-1], rel=0.02), stage
