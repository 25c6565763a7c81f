"""GiB that each process of a run needs on its card, or of RAM on CPUs: estimates from shapes, nothing is loaded.

What training keeps is counted exactly as `actors.learning.strategy` keeps it. Activations, and what CUDA and vLLM hold
beside weights, are estimates; none of them was measured on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from plumbline.config.fleet import GeneratorFleet, ReferenceFleet
from plumbline.config.learner import FullPolicy, Learner, LoraPolicy
from plumbline.config.pipelines import MethodBase, Pipeline
from plumbline.config.tree import Config
from plumbline.placement.sizes import Shape

GIB = 2**30
CONTEXT_GIB = 0.5
"""A process's CUDA context and libraries on its card. An estimate."""
ENGINE_GIB = 2.0
"""vLLM's activations of its largest batch, and its CUDA graphs. An estimate."""
ENGINE_RAM_GIB = 2.0
"""An idle vLLM engine on CPUs, before any weights. Measured."""
PROCESS_RAM_GIB = 1.0
"""Any other process of ours on CPUs, before any weights. Measured of learners and scorers."""
HEAD_LOGITS = 2**26
"""Logits that exist at once (`plumbline.models.lm_head`), as four tensors of float32 in a backward pass."""
LEAST_SEQUENCES = 8
"""Sequences of `model.max_len` that an engine must have KV cache for, to be worth its card."""
BUCKET = 2**26
"""Numbers that a collective of ZeRO moves, in each of two buffers (`actors.learning.strategy_deepspeed`)."""
LIVE = 10**9
"""Weights that ZeRO 3 gathers ahead: DeepSpeed's own default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """GiB of one process, and what they consist of, in words."""

    gib: float
    why: str


def layer_bytes(shape: Shape, width: int) -> int:
    """What autograd keeps of one layer for a token: of a Llama layer 12 vectors of the hidden size (norms in float32
    count twice) and 4 of the MLP's inner size, counted by hand."""
    return (12 * shape.hidden + 4 * shape.intermediate) * width


def kv_bytes(shape: Shape, width: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width


def _head_gib(shape: Shape, tokens: int, copies: int) -> float:
    return copies * 4 * min(HEAD_LOGITS, tokens * shape.vocab) / GIB


def adapter_slots(config: Config, versions: int) -> tuple[int, int]:
    """Adapters that an engine has room for, and their largest rank; none where it takes whole weights."""
    ranks = [p.policy.r for p in config.served if isinstance(p.policy, LoraPolicy)]
    return (versions, max(ranks)) if ranks else (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNeed:
    """An engine over `cards` cards: GiB on each, with the least KV cache and with all that it could ever use."""

    least: float
    most: float
    weights: float


def engine_need(
    settings: GeneratorFleet, max_len: int, shape: Shape, width: int, slots: tuple[int, int], cards: int
) -> EngineNeed:
    """On GPUs; weights, adapters and cache are cut over the cards."""
    count, rank = slots
    weights = (shape.parameters + count * shape.adapter(rank)) * width / GIB
    sequence = max_len * kv_bytes(shape, width) / GIB
    beside = ENGINE_GIB + CONTEXT_GIB
    return EngineNeed(
        least=(weights + min(LEAST_SEQUENCES, settings.max_num_seqs) * sequence) / cards + beside,
        most=(weights + settings.max_num_seqs * sequence) / cards + beside,
        weights=weights / cards,
    )


def learner_need(section: Pipeline, shape: Shape, width: int, workers: int, *, cuda: bool) -> Need:
    """One worker: weights, what the optimiser works on, and the activations of a micro-batch or, where that is more,
    the temporary copies of an optimiser's step."""
    settings = section.learner
    policy = getattr(section, "policy", None)
    adapter = shape.adapter(policy.r) if isinstance(policy, LoraPolicy) else 0
    trained = adapter or shape.parameters
    stage = (settings.zero or 2) if settings.strategy == "deepspeed" else 0
    cut = [workers if stage >= least else 1 for least in (1, 2, 3)]
    masters = 4 if width < 4 else 0  # of float32 weights the optimiser needs no copies
    moments = 8 if settings.optimizer == "adamw" else 4
    weights = (shape.parameters + adapter) * width / cut[2]
    states = trained * ((masters + moments) / cut[0] + 4 / cut[1])
    if stage:
        weights += 2 * min(BUCKET, trained) * width
    if stage == 3 and workers > 1:
        weights += min(LIVE, shape.parameters) * width
    step = trained * 4 / cut[0]  # of the size of the moments' half, as PyTorch says of its `foreach`
    activations = _activations(settings, shape, width)
    work = max(activations, step / GIB)
    laid_out = isinstance(section, MethodBase) and isinstance(policy, FullPolicy) and cuda and workers == 1
    published = shape.parameters * width if laid_out else 0  # for engines of the same card (`plumbline.models.ipc`)
    parts = [
        (weights / GIB, "weights"),
        (published / GIB, "published weights"),
        (states / GIB, "optimiser" if adapter == 0 else "adapter and optimiser"),
        (work, f"activations of {settings.micro_tokens} tokens" if work == activations else "optimiser's step"),
        (CONTEXT_GIB if cuda else PROCESS_RAM_GIB, "process"),
    ]
    return _sum(parts)


def _activations(settings: Learner, shape: Shape, width: int) -> float:
    layers = shape.layers * layer_bytes(shape, width)
    if settings.gradient_checkpointing:  # the input of each layer, and one layer at a time
        layers = shape.layers * shape.hidden * width + layer_bytes(shape, width)
    return settings.micro_tokens * layers / GIB + _head_gib(shape, settings.micro_tokens, copies=4)


def reference_need(settings: ReferenceFleet, shape: Shape, width: int, *, cuda: bool) -> Need:
    """The frozen model, which keeps no activations but of the layer it is in."""
    work = settings.batch_tokens * layer_bytes(shape, width) / GIB + _head_gib(shape, settings.batch_tokens, copies=2)
    parts = [
        (shape.parameters * width / GIB, "weights"),
        (work, f"activations of {settings.batch_tokens} tokens"),
        (CONTEXT_GIB if cuda else PROCESS_RAM_GIB, "process"),
    ]
    return _sum(parts)


def scorer_need(shapes: Sequence[tuple[Shape, int]], *, cuda: bool) -> Need:
    """The largest of some classifiers, each with the tokens of its forward, in the dtype of its files."""
    beside = (CONTEXT_GIB if cuda else PROCESS_RAM_GIB, "process")
    found = [Need(gib=beside[0], why=_told([beside]))]
    for shape, tokens in shapes:
        work = tokens * layer_bytes(shape, max(2, round(shape.stored / max(1, shape.parameters)))) / GIB
        found.append(_sum([(shape.stored / GIB, "weights"), (work, f"activations of {tokens} tokens"), beside]))
    return max(found, key=lambda need: need.gib)


def embedder_need(shape: Shape, *, cuda: bool) -> Need:
    """Sentence-transformers in float32; its activations are taken to be of the weights' size, at least 0.25 GiB."""
    weights = shape.parameters * 4 / GIB
    beside = (CONTEXT_GIB if cuda else PROCESS_RAM_GIB, "process")
    return _sum([(weights, "weights"), (max(0.25 if cuda else 0.0, weights), "a batch"), beside])


def engine_ram(settings: GeneratorFleet, shape: Shape, width: int) -> Need:
    """An engine on CPUs."""
    return _sum(
        [
            (shape.parameters * width / GIB, "weights"),
            (settings.kv_cache_gib, "KV cache"),
            (ENGINE_RAM_GIB, "process"),
        ]
    )


def bytes_of(dtype: Literal["float32", "bfloat16"]) -> int:
    """Of one number."""
    return 4 if dtype == "float32" else 2


def _sum(parts: Sequence[tuple[float, str]]) -> Need:
    return Need(gib=sum(gib for gib, _ in parts), why=_told(parts))


def _told(parts: Sequence[tuple[float, str]]) -> str:
    """What counts, the largest first."""
    return ", ".join(f"{gib:.1f} {what}" for gib, what in sorted(parts, reverse=True) if gib >= 0.05)
