"""The whole configuration of a run, as one tree of bounded fields. `plumbline.config.file` reads it for all others."""

from typing import Literal

from pydantic import Field, model_validator

from plumbline.config.data import Data, Model, Reward, SingleReward, reward_parts
from plumbline.config.effects import check_effects
from plumbline.config.fleet import Embedder, Fleet
from plumbline.config.hub import Commit
from plumbline.config.learner import FullPolicy, LoraPolicy
from plumbline.config.pipelines import Generation, MethodBase, MethodSection, Pipeline, Preference, Sft
from plumbline.config.section import Count, Name, Section, bounds
from plumbline.config.serving import Serve
from plumbline.config.tracking import Tracking


class Evaluation(Section):
    """Before against after on held-out prompts, at the end of a run."""

    prompts: Count = Field(default=256, description="how many held-out prompts, drawn by the seed")
    generation: Generation | None = Field(default=None, description="default: the pipeline's")
    samples: int = Field(default=20, ge=0, description="prompts whose answers are kept to be read side by side")
    judge: Reward | None = Field(default=None, description="a second reward that no training sees")


class Config(Section):
    """A run."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31, description="of every draw, sample and initial weight")
    deterministic: bool = Field(
        default=False,
        description="the same rollouts and weights, byte by byte, from the same seed, machine and versions; slower, "
        "on CPUs, with one generator",
    )
    storage_path: str | None = Field(
        default=None,
        min_length=1,
        description="path or URL (s3://bucket/runs) that keeps a copy of the run in `NAME/`, to resume elsewhere",
    )
    model: Model
    data: Data
    fleet: Fleet = Fleet()
    reward: Reward | None = None
    embedder: Embedder | None = None
    sft: Sft | None = None
    pipelines: list[Pipeline] = Field(min_length=1)
    evaluation: Evaluation | None = None
    tracking: Tracking = Tracking()
    serve: Serve = Serve()
    commits: dict[str, Commit] = Field(
        default={},
        description="which commit each hub name (`ORG/MODEL`, `ORG/MODEL@REVISION`) is; a run writes it when it begins",
    )

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        replicas = self.fleet.generator.replicas
        if self.serve.enabled and self.serve.placement == "pool" and replicas != "auto" and not bounds(replicas)[0]:
            raise ValueError(
                "`fleet.generator.replicas` may be none, and `serve.placement: pool` has them answer users; "
                "let its lower bound be 1, or serve with `placement: replicas`"
            )
        names = [p.name for p in (*self.pipelines, *([self.sft] if self.sft else []))]
        if repeated := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"two pipelines are named {repeated.pop()!r}; give each a `name` of its own")
        if "base" in names:
            raise ValueError("a pipeline is named 'base', which is π0's name; give it another `name`")
        if self.serve.gate and (self.evaluation is None or self.data.heldout is None):
            raise ValueError("`serve.gate` looks at held-out prompts; give `data.heldout` and `evaluation`")
        if self.sft and self.sft.learner.quantize and self.model.init:
            raise ValueError("`sft.learner.quantize` leaves the base as it is, which is random here; give `model.path`")
        if len({one.learner.quantize for one in self.methods if isinstance(one, Preference)}) > 1:
            raise ValueError(
                "pipelines of unlike `learner.quantize` share one reference, which would be another model than what "
                "some of them start from; give them runs of their own"
            )
        for one in self.served:
            if isinstance(one.policy, LoraPolicy) and one.policy.modules_to_save:
                raise ValueError(
                    f"`modules_to_save` of {one.name!r}: generators take adapters without whole layers; leave it "
                    "out, or write `policy: {type: full}`"
                )
        for one in self.methods:
            if isinstance(one.policy, FullPolicy) and len(self.methods) > 1:
                raise ValueError(
                    f"`policy: {{type: full}}` of {one.name!r} replaces the weights of all generators; "
                    "give it a run of its own, or `type: lora`"
                )
            if self.fleet.reference.replicas == "learner" and isinstance(one, Preference) and not one.keeps_base:
                raise ValueError(
                    f"`fleet.reference.replicas: learner` asks the learner of {one.name!r}, which does not hold π0: "
                    "that takes `policy: {type: lora}`, `train: true` and no `zero: 3`; or write `auto`"
                )
            if self.reward is None and one.needs_reward:
                raise ValueError(
                    f"a `{one.type}` pipeline needs `reward` (type: classifier, program, http, judge or sum)"
                )
            if self.model.init and self.sft is None:
                raise ValueError(
                    f"a `{one.type}` pipeline cannot start from random weights; add `sft`, or give `model.path`"
                )
            if one.embeds and self.embedder is None:
                raise ValueError(
                    f"a `{one.type}` pipeline needs `embedder` (a sentence-transformers model), or `filter: false`"
                )
        check_effects(self)
        return self

    @property
    def rewards(self) -> dict[str, SingleReward]:
        """All that gives scores, by its key: rewards and judges, of a sum its parts."""
        judge = self.evaluation.judge if self.evaluation else None
        parts = reward_parts(self.reward, "reward") | reward_parts(judge, "evaluation.judge")
        return {key: part.reward for key, part in parts.items()}

    @property
    def methods(self) -> list["MethodSection"]:
        """The pipelines whose policies generators serve."""
        return [p for p in self.pipelines if isinstance(p, MethodBase)]

    @property
    def served(self) -> list["MethodSection | Sft"]:
        """The pipelines whose versions generators load: all that generate and train, and `sft` with an adapter."""
        return [
            *(p for p in self.methods if p.trains),
            *(p for p in self.pipelines if isinstance(p, Sft) and p.serves_adapter),
        ]

    @property
    def reference_quantize(self) -> Literal["nf4"] | None:
        """What the reference is quantised to: as the learners that are held to it."""
        quantized = any(p.learner.quantize for p in self.methods if isinstance(p, Preference))
        return "nf4" if quantized else None

    @property
    def kept_versions(self) -> int:
        """Versions of a policy that generators keep: one that is coming, and those that rollouts may ask for."""
        return 2 + max((getattr(p, "max_staleness", 0) for p in self.methods), default=0)
