"""The sections of a config that say what a pipeline does: the methods that generate, `sft`, and `reward`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plumbline.config.data import Source
from plumbline.config.learner import FullPolicy, Learner, LoraPolicy, Policy
from plumbline.config.section import Count, Name, Section, Share, Tokens


class Generation(Section):
    """How rollouts are sampled."""

    max_tokens: Count = Field(default=256, description="of an answer")
    temperature: float = Field(default=1.0, ge=0, le=5, description="the methods ask for 1; 0 is greedy")
    top_p: Share = Field(default=1.0, description="share of the probability that is sampled from")
    stop: list[str] = Field(default=[], description="strings that end an answer, and are no part of it")


class PipelineBase(Section):
    """What every pipeline has."""

    name: Name
    learner: Learner = Learner()

    @property
    def trains(self) -> bool:
        """Whether it has a learner."""
        return True

    @property
    def keep_versions(self) -> int | None:
        """How many versions of its policy stay on disk, the newest; None: all.

        At least those since a checkpoint: a learner that goes on from there makes their steps again, not them.
        """
        keep = self.learner.keep_versions or (3 if isinstance(getattr(self, "policy", None), FullPolicy) else None)
        return keep and max(keep, self.learner.checkpoint_every or 1)

    @model_validator(mode="after")
    def _quantized(self) -> "PipelineBase":
        if self.learner.quantize and not isinstance(getattr(self, "policy", None), LoraPolicy):
            raise ValueError("`learner.quantize` is for a base under an adapter; write `policy: {type: lora}`")
        return self


class MethodBase(PipelineBase):
    """What every method has that generates: parts of prompts drawn from the pool of generators."""

    steps: Count | None = Field(default=None, description="parts; default: one pass over the prompts")
    batch_size: Count = Field(default=64, description="prompts a part")
    generation: Generation = Generation()
    policy: Policy = LoraPolicy()
    share: float = Field(default=1.0, gt=0, le=1000, description="weight of its requests where several wait")
    draws_as: Name | None = Field(
        default=None,
        description="a name that the order of prompts and the seeds of answers are made of, so that pipelines with the "
        "same one are compared on the same; default: its own",
    )

    @property
    def answers(self) -> int:
        """Answers that it asks for, a prompt."""
        return 2

    @property
    def needs_reward(self) -> bool:
        """Whether it cannot work without `reward`."""
        return False

    @property
    def needs_target(self) -> bool:
        """Whether every row needs a target."""
        return False

    @property
    def embeds(self) -> bool:
        """Whether it needs an `embedder`."""
        return False


class Ple(MethodBase):
    """Online learning with a principle-guided answer beside the plain one (METHODS.md §3)."""

    type: Literal["ple"]
    name: Name = "ple"
    principle: str = Field(default="harmless", description="a preset's name or the text itself")
    tau0: float = Field(default=0.2, ge=0, description="τ of the first step, in units of the reward")
    alpha: float = Field(default=0.9, gt=0, le=1, description="the threshold shrinks by it every step")
    replay_window: Count | None = Field(
        default=None, description="steps of D that are trained on; default: all, as the paper"
    )
    hinge: float | None = Field(default=None, gt=0, description="bound on L_rank's margin, nats a token; default: none")
    length_normalize_sft: bool = Field(default=False, description="weighted SFT by the mean a token; the paper sums")
    rank_weight: float = Field(default=1.0, ge=0, description="factor of the ranking loss; 0 leaves it out")
    sft_weight: float = Field(default=1.0, ge=0, description="factor of the weighted SFT; 0 leaves it out")
    max_staleness: int = Field(
        default=1, ge=0, le=64, description="versions a rollout may be behind; 0 is strictly on-policy"
    )

    @property
    def needs_reward(self) -> bool:
        return True


class Frozen(MethodBase):
    """What the methods have that generate from π0, and train on each part as it arrives."""

    epochs: Count = Field(default=1, description="passes of the learner over the parts")
    ahead: Count = Field(default=4, description="parts that generation may be ahead of the learner")
    train: bool = Field(default=True, description="false: only make the parts")

    @property
    def trains(self) -> bool:
        return self.train


class Preference(Frozen):
    """What the methods have that end in DPO."""

    beta: float = Field(default=0.1, gt=0, le=1000, description="DPO's β: how far the policy may go from π0")
    pairs: Source | None = Field(
        default=None,
        description="train on these instead: a directory of another run's parts; self_contrast takes a preference file "
        "too",
    )

    @property
    def keeps_base(self) -> bool:
        """Whether its learner holds π0 whole, under the adapter that it trains."""
        return self.train and isinstance(self.policy, LoraPolicy) and self.learner.zero != 3


class Contrasts(Section):
    """A wanted quality and its opposite: a preset, either side of which may be replaced, or both sides."""

    preset: str | None = Field(default=None, description="`harmless`, `helpful` or `positive`")
    positive: str | None = Field(default=None, description="text put before the query, for the wanted quality")
    negative: str | None = Field(default=None, description="text put before the query, for its opposite")


class Dlma(Preference):
    """Pairs from contrastive prompts, judged by the model's own odds, into a margin DPO (METHODS.md §1)."""

    type: Literal["dlma"]
    name: Name = "dlma"
    contrast: Contrasts = Contrasts(preset="harmless")
    sides: Literal["contrast", "plain"] = Field(
        default="contrast",
        description="what the two answers are to; plain: both to the query alone, the one that R prefers is the chosen "
        "one, as RLAIF has it",
    )
    scoring: Contrasts | None = Field(default=None, description="prompts of the self-reward; default: `contrast`")
    margin_weight: float = Field(default=0.2, ge=0, description="w, inside β; 0 is plain DPO")
    margin_clamp: tuple[float, float] = Field(default=(-40.0, 40.0), description="least and most R that counts, nats")
    eos_in_margin: bool = Field(default=False, description="whether R counts the end of the answer as a token")

    @model_validator(mode="after")
    def _ordered(self) -> "Dlma":
        low, high = self.margin_clamp
        if not low < high:
            raise ValueError(f"`margin_clamp` is [{low:g}, {high:g}]; the first should be the smaller")
        return self


class SelfContrast(Preference):
    """Many self-made negatives, filtered by an embedding, into a multi-negative DPO (METHODS.md §2).

    SPIN is ``samples: 1, negatives: 1, filter: false``; DPO on given pairs is `pairs` naming a preference file.
    """

    type: Literal["self_contrast"]
    name: Name = "self_contrast"
    samples: int = Field(default=32, ge=1, le=1024, description="R, answers drawn a prompt")
    keep: Share = Field(default=0.25, description="a, the share of least similar answers that negatives are drawn from")
    negatives: Count = Field(default=8, description="m, negatives a prompt")
    filter: bool = Field(default=True, description="false: negatives are drawn from all samples, without an embedder")

    @property
    def answers(self) -> int:
        return self.samples

    @property
    def needs_target(self) -> bool:
        """The positive, where pairs are made here."""
        return self.pairs is None

    @property
    def embeds(self) -> bool:
        """To filter what it samples by similarity."""
        return self.filter and self.pairs is None

    @model_validator(mode="after")
    def _pool(self) -> "SelfContrast":
        if self.pairs is not None:
            return self
        if not self.filter:
            if self.negatives > self.samples:
                raise ValueError(f"`negatives` is {self.negatives}, `samples` only {self.samples}; draw more samples")
            return self
        kept = int(self.samples * self.keep + 1e-9)
        if kept < 1:
            raise ValueError(
                f"`samples` · `keep` is {self.samples * self.keep:g}, below 1: nothing would be kept; raise either"
            )
        pool = min(kept, self.samples - 1)
        if self.negatives > pool:
            raise ValueError(
                f"`negatives` is {self.negatives}, but {self.samples} samples and keep {self.keep:g} leave at most "
                f"{pool} to draw from; raise `samples` or `keep`, or lower `negatives`"
            )
        return self


class Raft(Frozen):
    """Best of `samples` answers by the reward, then supervised fine-tuning on it: a baseline (METHODS.md §3)."""

    type: Literal["raft"]
    name: Name = "raft"
    samples: int = Field(default=4, ge=2, le=1024, description="answers drawn a prompt")

    @property
    def answers(self) -> int:
        return self.samples

    @property
    def needs_reward(self) -> bool:
        return True


MethodSection = Ple | Dlma | SelfContrast | Raft


class Sft(PipelineBase):
    """Supervised fine-tuning on (prompt, target). As the top-level `sft` section it makes π0 before the pipelines."""

    type: Literal["sft"] = "sft"
    name: Name = "sft"
    epochs: Count = Field(default=1, description="passes over the prompts")
    policy: Policy = FullPolicy(type="full")

    @property
    def serves_adapter(self) -> bool:
        """Whether generators can load its versions beside the others'."""
        return isinstance(self.policy, LoraPolicy)


class RewardModel(PipelineBase):
    """A sequence classifier from labelled texts, or from preference pairs by Bradley-Terry."""

    type: Literal["reward"]
    name: Name = "reward"
    source: Literal["labelled", "pairs"] = Field(default="labelled", description="what the rows of the data are")
    reads: Literal["response", "pair", "conversation"] = Field(default="response", description="see `reward.reads`")
    epochs: Count = Field(default=1, description="passes over the data")
    max_len: Tokens = Field(
        default="auto",
        description="tokens; longer texts are cut, and counted; auto: 256, or what the model reads if that is less",
    )


Pipeline = Annotated[Ple | Dlma | SelfContrast | Raft | Sft | RewardModel, Field(discriminator="type")]
