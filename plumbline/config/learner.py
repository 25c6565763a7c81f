"""The sections of a config that say how a pipeline learns: what of a policy is trained, and by which Ray Train run."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from plumbline.config.section import Count, Cpus, Elastic, Gpus, Resources, Section, bounds


def _names(value: Any) -> Any:
    """One line for what is neither: a union's own errors name its kinds, which no config has."""
    listed = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    if value != "all-linear" and not listed:
        given = f", got {value}" if isinstance(value, list) else ""
        raise ValueError(f"should be all-linear, or a list of layers' last names, such as [q_proj, v_proj]{given}")
    return value


class LoraPolicy(Section):
    """An adapter on the shared base."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=512, description="rank")
    alpha: float = Field(default=16, gt=0, description="the scaling is alpha / r")
    rslora: bool = Field(default=False, description="the scaling is alpha / √r instead, for high ranks")
    target_modules: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_names)] = Field(
        default="all-linear", description="which layers get one: all but the LM head, or such of these last names"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapter's inputs, in updates alone")
    modules_to_save: list[str] = Field(
        default=[],
        description="trained whole beside it, by last name, such as [lm_head]; top-level `sft` alone, which merges",
    )


class FullPolicy(Section):
    """All weights."""

    type: Literal["full"]


Policy = Annotated[LoraPolicy | FullPolicy, Field(discriminator="type")]


class Learner(Section):
    """One Ray Train run."""

    strategy: Literal["torch", "deepspeed"] = Field(default="torch", description="deepspeed: ZeRO over the workers")
    zero: Literal[1, 2, 3] | None = Field(
        default=None, description="deepspeed cuts over workers: 1 optimiser, 2 gradients too (default), 3 weights too"
    )
    workers: Elastic = Field(
        default=1, description="or bounds such as [1, 4]: as many as the cluster has room for, looked at every minute"
    )
    cpus: Cpus = Field(default="auto", description="threads a worker")
    gpus: Gpus = Field(default="auto", description="a worker, a share of one below 1")
    resources: Resources = Field(default={})
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: the base in 4 bits under an adapter (QLoRA), and the reference with it",
    )
    optimizer: Literal["adamw", "adamw_8bit", "rmsprop"] = Field(
        default="adamw", description="adamw_8bit: its state in 8 bits; DLMA's code has rmsprop"
    )
    lr: float = Field(default=1e-4, gt=0, le=1, description="learning rate, at its highest")
    weight_decay: float = Field(default=0.0, ge=0, description="an L2 term with rmsprop, else decoupled")
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="cosine: falls towards 0 by parts")
    warmup: int = Field(default=0, ge=0, description="optimiser steps of linear warm-up")
    clip_norm: float = Field(default=1.0, gt=0, description="most that a gradient's norm may be")
    batch_size: Count = Field(default=64, description="prompts an optimiser step")
    micro_tokens: Count = Field(default=8192, description="tokens of one forward and backward")
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time a step")
    checkpoint_every: Count | None = Field(default=None, description="parts; default: 1, or 50 for one whole model")
    keep_versions: Count | None = Field(
        default=None,
        description="versions kept on disk, and those since a checkpoint; default: all adapters, of whole models 3",
    )
    max_skipped: int = Field(
        default=3, ge=0, description="optimiser steps in a row left out for a loss or gradient that is not finite"
    )
    max_failures: int = Field(default=3, ge=0, description="dead workers that Ray Train replaces")

    @model_validator(mode="after")
    def _stage(self) -> "Learner":
        if self.zero is not None and self.strategy != "deepspeed":
            raise ValueError("`zero` needs `strategy: deepspeed` beside it")
        if self.strategy == "deepspeed" and (self.quantize or self.optimizer == "adamw_8bit"):
            key = "quantize" if self.quantize else "optimizer: adamw_8bit"
            raise ValueError(f"`{key}` cannot be cut over workers by deepspeed; write `strategy: torch`")
        if bounds(self.workers)[0] < 1:
            raise ValueError(f"`workers` is {list(bounds(self.workers))}; a learner has at least one worker")
        return self
