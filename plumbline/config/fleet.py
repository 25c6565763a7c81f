"""The sections of a config that say which processes a run has: generators, rewards, the reference, an embedder."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from plumbline.config.hub import Revision
from plumbline.config.section import AutoElastic, Count, Cpus, Gpus, MemoryShare, Resources, Section
from plumbline.config.vllm_arguments import VllmArguments


class GeneratorFleet(Section):
    """One engine an actor; `cpus` are threads and Ray resources alike."""

    replicas: AutoElastic = Field(
        default="auto",
        description="engines, or bounds such as [1, 4] or [0, 4] between which their number follows the work; "
        "auto: as many as the GPUs have room for, 1 on CPUs",
    )
    scale_up_after: float = Field(
        default=5, ge=0, description="seconds that requests wait before more engines start; without any, none"
    )
    scale_down_after: float = Field(
        default=60, gt=0, description="seconds in which one engine less would have done, before one leaves"
    )
    cpus: Cpus = Field(default="auto", description="of an engine")
    gpus: Gpus = Field(
        default="auto", description="of an engine: a share of one, or a whole number that its model is cut over"
    )
    resources: Resources = Field(default={})
    max_num_seqs: Count = Field(default=256, description="sequences that an engine decodes together")
    kv_cache_gib: float = Field(default=0.5, gt=0, description="on CPUs")
    memory_share: MemoryShare = Field(default="auto", description="of each of its GPUs' whole memory")
    vllm: VllmArguments = Field(default={})


class ScorerFleet(Section):
    """Reward models; a programmatic reward needs one replica without a CPU of its own."""

    replicas: Count = Field(default=1, description="of each reward")
    cpus: float = Field(default=0, ge=0, description="Ray resources; 0 shares the machine")
    gpus: Gpus = Field(default="auto", description="of a replica, a share of one where it is below 1")
    resources: Resources = Field(default={})


def _copies(value: Any) -> Any:
    """One line for what is none of them: a union's own errors name its kinds, which no config has."""
    count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not count and value not in ("auto", "learner"):
        raise ValueError("should be auto, learner, or a count of 1 or more")
    return value


class ReferenceFleet(Section):
    """The frozen π0: reference log-probs of DPO, contrastive log-probs of DLMA."""

    replicas: Annotated[Literal["auto", "learner"] | Count, BeforeValidator(_copies)] = Field(
        default="auto",
        description="copies of π0; learner: none, each pipeline's learner answers with its adapter switched off; auto: "
        "learner where all learners train LoRA on GPUs of one machine, else 1",
    )
    cpus: Cpus = Field(default="auto", description="threads; they share the machine, as Ray resources they count 0")
    gpus: Gpus = Field(default="auto", description="of a replica, a share of one where it is below 1")
    resources: Resources = Field(default={})
    batch_tokens: Count = Field(default=8192, description="tokens of one forward; of a learner, its `micro_tokens`")
    cache: str | None = Field(
        default=None,
        description="directory of the cache of log-probs; default: plumbline in the user's cache directory",
    )


class Embedder(Section):
    """A sentence-transformers model that compares answers with targets; pooling and maximum length are its own."""

    path: str = Field(description="its directory or hub name")
    revision: Revision = Field(
        default=None, description="of a hub name: branch, tag or commit; default: its main branch"
    )
    replicas: Count = Field(default=1, description="copies of the model")
    gpus: Gpus = Field(default="auto", description="of a replica, a share of one where it is below 1")
    resources: Resources = Field(default={})
    batch_size: Count = Field(default=64, description="texts of one forward")


class Fleet(Section):
    """The processes that all pipelines of a run share."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="auto: vLLM where it is installed"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where a GPU is visible")
    generator: GeneratorFleet = GeneratorFleet()
    scorer: ScorerFleet = ScorerFleet()
    reference: ReferenceFleet = ReferenceFleet()
    sync_tolerance: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="nats a probe token may differ; default: by dtype, under `learner.quantize` that of bfloat16",
    )

    @model_validator(mode="after")
    def _of_vllm(self) -> "Fleet":
        if self.engine == "transformers" and self.generator.vllm:
            raise ValueError(
                "`generator.vllm` are arguments of vLLM, and `engine` is transformers; leave one of them out"
            )
        gpus = self.generator.gpus
        if self.engine == "transformers" and not isinstance(gpus, str) and gpus > 1:
            raise ValueError("`engine: transformers` computes on one GPU, and `generator.gpus` asks for more; give 1")
        return self
