"""The seam between a generator and what computes its tokens: vLLM, or plain transformers where no vLLM wheel exists.

An engine serves one base model and any number of LoRA adapters beside it, or one model whose weights are replaced. The
generator above it knows about policies, versions and proofs; an engine knows only about weights.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from plumbline.config.learner import FullPolicy, LoraPolicy
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.records import Completion, Head, Sampling, SharedWeights, UserRequest

EngineKind = Literal["vllm", "transformers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter on the engine's own disk, as PEFT writes it. `id` >= 1 is never used twice in an engine's life."""

    id: int
    name: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """All that an engine needs to start; picklable. `kv_cache_gib` counts on CPUs, `memory_share` on GPUs.

    `max_adapters` is 0 for an engine that takes whole weights (`Engine.load_weights`), and no adapters. With `seats` it
    answers users too, up to so many beside the `max_num_seqs` of rollouts and before them. The model is cut over
    `tensor_parallel` workers, a GPU each. `vllm` are arguments of vLLM's that a config adds. `lora_targets`: last names
    of the layers that adapters touch; none are named where it is all linear ones. `tokenizer_path` and `chat_template`
    (its text) replace the model's own. `deterministic`: the same requests, asked together, get the same answers.
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
    seats: int = 0
    tokenizer_path: str | None = None
    chat_template: str | None = None
    lora_targets: tuple[str, ...] = ()
    tensor_parallel: int = 1
    vllm: Mapping[str, Any] = field(default_factory=dict)
    deterministic: bool = False

    @property
    def batch(self) -> int:
        """Answers that a pipeline should ask for at a time."""
        return max(1, self.max_num_seqs // 4)

    @property
    def in_flight(self) -> int:
        """Answers that it should be asked for at once.

        More than it decodes: some wait there, to take a free place before the pool hears of it. Where users have seats
        nothing may wait, for what waits would take them; so it decodes all of these, and there are fewer.
        """
        return self.max_num_seqs + (1 if self.seats else 3) * self.batch

    @property
    def decoded(self) -> int:
        """Answers that it decodes together at most."""
        return self.in_flight + self.seats if self.seats else self.max_num_seqs


def engine_spec(
    config: Config,
    model_path: str,
    dtype: Literal["float32", "bfloat16", "float16"],
    device: Literal["cpu", "cuda"],
    *,
    versions: int,
    seats: int = 0,
    chat_template: str | None = None,
) -> EngineSpec:
    """An engine for the policies of a run, with room for so many `versions` where they are adapters.

    Args:
        model_path: π0's directory, the config's model or what was made of it, with a tokenizer of its own then.
        chat_template: text of the one that the run renders with.
    """
    settings = config.fleet.generator
    adapters = [p.policy for p in config.served if isinstance(p.policy, LoraPolicy)]
    listed = [policy.target_modules for policy in adapters if isinstance(policy.target_modules, list)]
    targets = sorted({name for names in listed for name in names}) if len(listed) == len(adapters) else []
    whole = any(isinstance(p.policy, FullPolicy) for p in config.served)
    return EngineSpec(
        model_path=model_path,
        dtype=dtype,
        device=device,
        max_model_len=planned(config.model.max_len),
        max_num_seqs=settings.max_num_seqs,
        max_lora_rank=max((policy.r for policy in adapters), default=8),
        max_adapters=versions if adapters and not whole else 0,
        threads=planned(settings.cpus),
        kv_cache_gib=settings.kv_cache_gib,
        memory_share=planned(settings.memory_share),
        seed=config.seed,
        seats=seats,
        tokenizer_path=config.model.at(model_path).tokenizer,
        chat_template=chat_template,
        lora_targets=tuple(targets),
        tensor_parallel=max(1, int(settings.gpus)) if device == "cuda" else 1,
        vllm=settings.vllm,
        deterministic=config.deterministic,
    )


class Engine(Protocol):
    """What a generator asks of it. All calls may overlap; `adapter=None` means the base model."""

    @property
    def kind(self) -> EngineKind:
        """What a config calls it."""
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

    def answer(self, request: UserRequest, *, adapter: Adapter | None) -> AsyncIterator[Head | str]:
        """A user's answer: its head, then pieces of its body. Raises RunError where the engine has no `seats`."""
        ...

    async def add_adapter(self, adapter: Adapter) -> None: ...

    async def remove_adapter(self, adapter: Adapter) -> None: ...

    async def load_weights(self, path: str, shared: SharedWeights | None = None) -> bool:
        """Replace all weights by those of a model's directory, of the same shapes. No request may be under way.

        Args:
            shared: the same on a card. Every worker that is on that card reads them there.

        Returns:
            Whether any did.
        """
        ...

    async def digests(self, names: Sequence[str], *, adapter: Adapter | None) -> list[dict[str, str | None]]:
        """What every worker holds of an adapter's modules, or of all weights: digests (`plumbline.models.digest`).

        Args:
            names: the learner's, such as ``model.layers.0.self_attn.q_proj``, or that with ``.weight``.

        Returns:
            One a worker, ``name -> digest``: None where it is kept in another form, no entry where it is not there. An
            adapter's modules that `names` lacks are told too.
        """
        ...

    async def check_health(self) -> None:
        """Raises RuntimeError where it will never answer again, such as when its process has died."""
        ...

    async def close(self) -> None: ...
