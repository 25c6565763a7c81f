"""The whole configuration of a run, as one tree of bounded fields. `plumbline.config_file` reads it for all others."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plumbline.dataset import Reading
from plumbline.endpoint import Serve
from plumbline.fleet import Embedder, Fleet
from plumbline.learning import FullPolicy, Learner, LoraPolicy, Policy
from plumbline.section import Count, Name, Section, Share, bounds
from plumbline.tracking import Tracking


class Model(Section):
    """The base model: a local directory (`path`) or a randomly initialised one (`init`, needs `tokenizer`)."""

    path: str | None = Field(
        default=None, description="directory of a transformers causal language model in safetensors"
    )
    init: dict[str, Any] | None = Field(
        default=None, description="a transformers config (`model_type`, …), random weights"
    )
    tokenizer: str | None = Field(default=None, description="directory of the tokenizer; default: `path`")
    chat_template: str | None = Field(
        default=None, description="`chatml`, `plain`, or a Jinja file; default: the tokenizer's"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: float32 on CPUs, else bfloat16"
    )
    max_len: int = Field(default=1024, ge=16, description="tokens of a prompt and its response together")

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of `path` (a model directory) and `init` (a config, random weights)")
        if self.init is not None and (self.tokenizer is None or "model_type" not in self.init):
            raise ValueError("`init` needs `model_type` in it and `tokenizer` beside it")
        return self

    @property
    def tokenizer_path(self) -> str:
        """Directory the tokenizer is read from."""
        path = self.tokenizer or self.path
        assert path is not None
        return path


class Source(Section):
    """A file (.jsonl, .jsonl.gz, .parquet, .csv) or a Hugging Face dataset, by directory or name."""

    path: str = Field(description="the file, the dataset's directory or its name")
    split: str = Field(default="train", description="of a dataset")
    columns: dict[str, str] = Field(default={}, description="our column name -> the file's, such as {prompt: question}")
    where: dict[str, str | int | float | bool] = Field(
        default={}, description="a column of the file -> its value in the rows to use, such as {label: 1}"
    )
    limit: Count | None = Field(default=None, description="use the first such rows only")

    @property
    def reading(self) -> Reading:
        """What the readers take beside the path."""
        return Reading(columns=self.columns, where=self.where, split=self.split, limit=self.limit)


class Data(Section):
    """What the run learns on, and what it is judged on."""

    train: Source = Field(description="what the pipelines draw prompts, targets and pairs from")
    heldout: Source | None = Field(default=None, description="what `evaluation` asks; no training sees it")
    max_prompt_tokens: Count = Field(
        default=256, description="longer prompts are counted and listed in rejected.parquet"
    )


class ClassifierReward(Section):
    """A Hugging Face sequence classifier. Two labels: log-odds of the second; one label: its value."""

    type: Literal["classifier"]
    path: str = Field(description="its directory, or that of a `reward` pipeline's policy: the newest version is taken")
    reads: Literal["response", "pair", "conversation"] = Field(
        default="response",
        description="the answer alone, (query, answer) as a text pair, or the chat template's rendering",
    )
    max_len: Count = Field(default=512, description="tokens; longer inputs are cut, and counted")
    batch_tokens: Count = Field(default=8192, description="tokens of one forward, padding included")


class ProgramReward(Section):
    """A Python function ``(Sequence[ScoreRequest]) -> list[float]``, named `module:function`."""

    type: Literal["program"]
    function: str = Field(pattern=r"^[\w.]+:\w+$", description="importable from the working directory")


Reward = Annotated[ClassifierReward | ProgramReward, Field(discriminator="type")]


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


class Rolling(PipelineBase):
    """What every method has that generates: parts of prompts drawn from the pool of generators."""

    steps: Count | None = Field(default=None, description="parts; default: one pass over the prompts")
    batch_size: Count = Field(default=64, description="prompts a part")
    generation: Generation = Generation()
    policy: Policy = LoraPolicy()
    share: float = Field(default=1.0, gt=0, le=1000, description="weight of its requests where several wait")


class Ple(Rolling):
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


class Frozen(Rolling):
    """What the methods have that generate from π0, and train on each part as it arrives."""

    epochs: Count = Field(default=1, description="passes of the learner over the parts")
    ahead: Count = Field(default=4, description="parts that generation may be ahead of the learner")
    train: bool = Field(default=True, description="false: only make the parts")


class Preference(Frozen):
    """What the methods have that end in DPO."""

    beta: float = Field(default=0.1, gt=0, description="DPO's β: how far the policy may go from π0")
    pairs: Source | None = Field(
        default=None, description="train on these instead: a directory of parts that another run made"
    )


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
    def embeds(self) -> bool:
        """Whether it filters what it samples by similarity."""
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
    max_len: Count = Field(default=256, description="tokens; longer texts are cut, and counted")


Pipeline = Annotated[Ple | Dlma | SelfContrast | Raft | Sft | RewardModel, Field(discriminator="type")]


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

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.serve.enabled and self.serve.placement == "pool" and not bounds(self.fleet.generator.replicas)[0]:
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
        for one in self.rolling:
            if isinstance(one.policy, FullPolicy) and len(self.rolling) > 1:
                raise ValueError(
                    f"`policy: {{type: full}}` of {one.name!r} replaces the weights of all generators; "
                    "give it a run of its own, or `type: lora`"
                )
            if self.reward is None and isinstance(one, Ple | Raft):
                raise ValueError(f"a `{one.type}` pipeline needs `reward` (type: classifier or type: program)")
            if self.model.init and self.sft is None:
                raise ValueError(
                    f"a `{one.type}` pipeline cannot start from random weights; add `sft`, or give `model.path`"
                )
            if isinstance(one, SelfContrast) and one.embeds and self.embedder is None:
                raise ValueError(
                    "`self_contrast` needs `embedder` (path: a sentence-transformers model), or `filter: false`"
                )
        return self

    @property
    def rolling(self) -> list["Rolled"]:
        """The pipelines whose policies generators serve."""
        return [p for p in self.pipelines if isinstance(p, Ple | Dlma | SelfContrast | Raft)]

    @property
    def served(self) -> list["Rolled | Sft"]:
        """The pipelines whose versions generators load: all that generate, and `sft` with an adapter."""
        return [*self.rolling, *(p for p in self.pipelines if isinstance(p, Sft) and p.serves_adapter)]

    @property
    def kept_versions(self) -> int:
        """Versions of a policy that generators keep: one that is coming, and those that rollouts may ask for."""
        return 2 + max((p.max_staleness for p in self.pipelines if isinstance(p, Ple)), default=0)


Rolled = Ple | Dlma | SelfContrast | Raft
