"""The seam between a generator and what computes its tokens: vLLM, or plain transformers where no vLLM wheel exists.

An engine serves one base model and any number of LoRA adapters beside it, or one model whose weights are replaced. The
generator above it knows about policies, versions and proofs; an engine knows only about weights.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from plumbline.records import Completion, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter on the engine's own disk, as PEFT writes it. `id` >= 1 is never used twice in an engine's life."""

    id: int
    name: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """All that an engine needs to start; picklable. `kv_cache_gib` counts on CPUs, `memory_share` on GPUs.

    `max_adapters` is 0 for an engine that takes whole weights (`Engine.load_weights`), and no adapters.
    """

    model_path: str
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    max_model_len: int
    max_num_seqs: int
    max_lora_rank: int
    max_adapters: int
    threads: int
    kv_cache_gib: float
    memory_share: float
    seed: int


class Engine(Protocol):
    """What a generator asks of it. All calls may overlap; `adapter=None` means the base model."""

    @property
    def kind(self) -> str:
        """ "vllm" or "transformers"."""
        ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, n: int, adapter: Adapter | None
    ) -> list[Completion]:
        """`n` samples of one prompt; sample i is drawn with seed ``seed + i`` and repeats exactly."""
        ...

    async def logprobs(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], *, adapter: Adapter | None
    ) -> list[float]:
        """Log-probs of each response token under temperature 1, one a token (METHODS.md §0)."""
        ...

    async def add_adapter(self, adapter: Adapter) -> None: ...

    async def remove_adapter(self, adapter: Adapter) -> None: ...

    async def load_weights(self, path: str) -> None:
        """Replace all weights by those of a model's directory, of the same shapes. No request may be under way."""
        ...

    async def close(self) -> None: ...


def resolve_engine(choice: Literal["auto", "vllm", "transformers"]) -> Literal["vllm", "transformers"]:
    """`auto` is vLLM where it is installed."""
    if choice != "auto":
        return choice
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


def start_engine(choice: Literal["vllm", "transformers"], spec: EngineSpec) -> Engine:
    """Load the model; takes seconds to minutes. Must be called inside a running event loop."""
    if choice == "vllm":
        from actors.engine_vllm import VllmEngine

        return VllmEngine(spec)
    from actors.engine_transformers import TransformersEngine

    return TransformersEngine(spec)
