"""The whole configuration of a run: one YAML file, one tree of bounded fields. The CLI loads it, all others read it.

Unknown keys, wrong types and values out of bounds are refused with one line that names the file, the key and what would
be right. Local paths are taken from the working directory and kept absolute, so that a run resumes from anywhere.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from plumbline.errors import ConfigError

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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

    path: str
    split: str = "train"
    columns: dict[str, str] = Field(default={}, description="our column name -> the file's, such as {prompt: question}")
    limit: Count | None = Field(default=None, description="use the first rows only")


class Data(Section):
    """What the run learns on, and what it is judged on."""

    train: Source
    heldout: Source | None = None
    max_prompt_tokens: Count = Field(
        default=256, description="longer prompts are counted and listed in rejected.parquet"
    )


class ClassifierReward(Section):
    """A Hugging Face sequence classifier. Two labels: log-odds of the second; one label: its value."""

    type: Literal["classifier"]
    path: str
    reads: Literal["response", "pair", "conversation"] = Field(
        default="response",
        description="the answer alone, (query, answer) as a text pair, or the chat template's rendering",
    )
    max_len: Count = Field(default=512, description="tokens; longer inputs are cut, and counted")
    batch_tokens: Count = 8192


class ProgramReward(Section):
    """A Python function ``(Sequence[ScoreRequest]) -> list[float]``, named `module:function`."""

    type: Literal["program"]
    function: str = Field(pattern=r"^[\w.]+:\w+$")


Reward = Annotated[ClassifierReward | ProgramReward, Field(discriminator="type")]


class GeneratorFleet(Section):
    """One engine an actor; `cpus` are threads and Ray resources alike."""

    replicas: Count = 1
    cpus: Count = 1
    gpus: float = Field(default=0, ge=0)
    max_num_seqs: Count = Field(default=256, description="sequences that an engine decodes together")
    kv_cache_gib: float = Field(default=0.5, gt=0, description="on CPUs")
    memory_share: Share = Field(default=0.85, description="of a GPU's memory")


class ScorerFleet(Section):
    """Reward models; a programmatic reward needs one replica without a CPU of its own."""

    replicas: Count = 1
    cpus: float = Field(default=0, ge=0, description="Ray resources; 0 shares the machine")
    gpus: float = Field(default=0, ge=0)


class ReferenceFleet(Section):
    """The frozen π0: reference log-probs of DPO, contrastive log-probs of DLMA."""

    replicas: Count = 1
    cpus: Count = Field(default=1, description="threads; they share the machine, as Ray resources they count 0")
    gpus: float = Field(default=0, ge=0)
    batch_tokens: Count = Field(default=8192, description="tokens of one forward")
    cache: str | None = Field(
        default=None, description="directory of the cache of log-probs; default: plumbline in the user's cache directory"
    )


class Embedder(Section):
    """A sentence-transformers model that compares answers with targets; pooling and maximum length are its own."""

    path: str = Field(description="its directory, or a name of the hub that is in the cache")
    replicas: Count = 1
    gpus: float = Field(default=0, ge=0)
    batch_size: Count = 64


class Fleet(Section):
    """The processes that all pipelines of a run share."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="auto: vLLM where it is installed"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    generator: GeneratorFleet = GeneratorFleet()
    scorer: ScorerFleet = ScorerFleet()
    reference: ReferenceFleet = ReferenceFleet()
    sync_tolerance: float | None = Field(
        default=None, gt=0, description="nats a probe token may differ; default: by dtype"
    )


class Generation(Section):
    """How rollouts are sampled."""

    max_tokens: Count = 256
    temperature: float = Field(default=1.0, ge=0, le=5)
    top_p: Share = 1.0
    stop: list[str] = []


class LoraPolicy(Section):
    """An adapter on the shared base."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=512)
    alpha: float = Field(default=16, gt=0, description="the scaling is alpha / r")


class FullPolicy(Section):
    """All weights."""

    type: Literal["full"]


Policy = Annotated[LoraPolicy | FullPolicy, Field(discriminator="type")]


class Learner(Section):
    """One Ray Train run."""

    strategy: Literal["torch"] = "torch"
    workers: Count = 1
    cpus: Count = Field(default=1, description="threads a worker")
    gpus: float = Field(default=0, ge=0, description="a worker")
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    lr: float = Field(default=1e-4, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0, description="optimiser steps of linear warm-up")
    clip_norm: float = Field(default=1.0, gt=0)
    batch_size: Count = Field(default=64, description="prompts an optimiser step")
    micro_tokens: Count = Field(default=8192, description="tokens of one forward and backward")
    gradient_checkpointing: bool = False
    checkpoint_every: Count | None = Field(
        default=None, description="parts; default: 1 for an adapter, 50 for all weights"
    )
    max_failures: int = Field(default=3, ge=0, description="dead workers that Ray Train replaces")


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
    tau0: float = Field(default=0.2, ge=0)
    alpha: float = Field(default=0.9, gt=0, le=1, description="the threshold shrinks by it every step")
    replay_window: Count | None = Field(
        default=None, description="steps of D that are trained on; default: all, as the paper"
    )
    hinge: float | None = Field(default=None, gt=0, description="bound on L_rank's margin, nats a token; default: none")
    length_normalize_sft: bool = False
    rank_weight: float = Field(default=1.0, ge=0)
    sft_weight: float = Field(default=1.0, ge=0)
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

    beta: float = Field(default=0.1, gt=0)
    pairs: Source | None = Field(
        default=None, description="train on these instead: a directory of parts that another run made"
    )


class Contrasts(Section):
    """A wanted quality and its opposite: a preset, either side of which may be replaced, or both sides."""

    preset: str | None = None
    positive: str | None = None
    negative: str | None = None


class Dlma(Preference):
    """Pairs from contrastive prompts, judged by the model's own odds, into a margin DPO (METHODS.md §1)."""

    type: Literal["dlma"]
    name: Name = "dlma"
    contrast: Contrasts = Contrasts(preset="harmless")
    scoring: Contrasts | None = Field(default=None, description="prompts of the self-reward; default: `contrast`")
    margin_weight: float = Field(default=0.2, ge=0, description="w, inside β; 0 is plain DPO")
    margin_clamp: tuple[float, float] = (-40.0, 40.0)
    eos_in_margin: bool = False

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
    samples: int = Field(default=4, ge=2, le=1024)


class Sft(PipelineBase):
    """Supervised fine-tuning on (prompt, target). As the top-level `sft` section it makes π0 before the pipelines."""

    type: Literal["sft"] = "sft"
    name: Name = "sft"
    epochs: Count = 1
    policy: Policy = FullPolicy(type="full")


class RewardModel(PipelineBase):
    """A sequence classifier from labelled texts, or from preference pairs by Bradley-Terry."""

    type: Literal["reward"]
    name: Name = "reward"
    source: Literal["labelled", "pairs"] = "labelled"
    reads: Literal["response", "pair", "conversation"] = Field(default="response", description="see `reward.reads`")
    epochs: Count = 1
    max_len: Count = Field(default=256, description="tokens; longer texts are cut, and counted")


Pipeline = Annotated[Ple | Dlma | SelfContrast | Raft | Sft | RewardModel, Field(discriminator="type")]


class Evaluation(Section):
    """Before against after on held-out prompts, at the end of a run."""

    prompts: Count = 256
    generation: Generation | None = Field(default=None, description="default: the pipeline's")
    samples: int = Field(default=20, ge=0, description="prompts whose answers are kept to be read side by side")
    judge: Reward | None = Field(default=None, description="a second reward that no training sees")


class Config(Section):
    """A run."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    model: Model
    data: Data
    fleet: Fleet = Fleet()
    reward: Reward | None = None
    embedder: Embedder | None = None
    sft: Sft | None = None
    pipelines: list[Pipeline] = Field(min_length=1)
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        names = [p.name for p in (*self.pipelines, *([self.sft] if self.sft else []))]
        if repeated := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"two pipelines are named {repeated.pop()!r}; give each a `name` of its own")
        for one in self.rolling:
            if self.reward is None and isinstance(one, Ple | Raft):
                raise ValueError(f"a `{one.type}` pipeline needs `reward` (type: classifier or type: program)")
            if self.model.init and self.sft is None:
                raise ValueError(
                    f"a `{one.type}` pipeline cannot start from random weights; add `sft`, or give `model.path`"
                )
            if isinstance(one, SelfContrast) and one.filter and one.pairs is None and self.embedder is None:
                raise ValueError(
                    "a `self_contrast` pipeline needs `embedder` (path: a sentence-transformers model), or `filter: false`"
                )
        return self

    @property
    def rolling(self) -> list["Rolled"]:
        """The pipelines whose policies generators serve."""
        return [p for p in self.pipelines if isinstance(p, Ple | Dlma | SelfContrast | Raft)]


Rolled = Ple | Dlma | SelfContrast | Raft


LOCAL_PATHS = {"path", "tokenizer", "chat_template", "cache"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply ``key.sub=value`` overrides (values are YAML), check everything.

    Raises:
        ConfigError: one line naming the file, the key, what is wrong and what would be right.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; name a YAML config, such as configs/quickstart.yaml") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{file}: not a text file ({error}); a config is YAML in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); make it readable") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a config is a mapping of keys, this is {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree, origin=str(file))


def parse_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Check a tree that is already in memory; `origin` is what messages call it. Raises ConfigError."""
    try:
        return Config.model_validate(_absolute(tree))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write KEY=VALUE, such as --set fleet.generator.replicas=2")
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[_index(node, part, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {part} holds a value, not a section")
    place: Any = _index(node, last, override) if isinstance(node, list) else last
    try:
        node[place] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {value!r} is no YAML value; quote text that holds : [ {{ or #") from None


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set {override}: {part!r} is no position in a list of {len(items)}; write 0, 1, …")
    return int(part)


def _absolute(node: Any, key: str = "") -> Any:
    """Local paths made absolute; names that are no local path (a dataset's, `chatml`) stay."""
    if isinstance(node, Mapping):
        return {k: _absolute(v, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_absolute(v) for v in node]
    if key in LOCAL_PATHS and isinstance(node, str) and (node.startswith((".", "~")) or Path(node).exists()):
        return str(Path(node).expanduser().resolve())
    return node


def _explain(error: ValidationError) -> str:
    """The first problem of a validation, as one line."""
    problem = next(
        (e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0]
    )  # a misspelt key also makes the right one "missing": name the misspelling
    location, _ = _walk(problem["loc"])
    key = ".".join(map(str, location)) or "config"
    if problem["type"] == "extra_forbidden":
        _, sections = _walk(problem["loc"][:-1])
        known = [name for section in sections for name in section.model_fields]
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key}: missing; this key is required"
    if problem["type"] == "union_tag_invalid":
        context = problem.get("ctx", {})
        return f"{key}.type: {context.get('tag')!r} is unknown; known are {context.get('expected_tags')}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.type: missing; say which kind this is"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a mapping of keys"
    given = problem["input"]
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _walk(location: Sequence[int | str]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """A location without the union tags that pydantic puts into it (pipelines.0.ple.steps), and the sections there."""
    kept: list[int | str] = []
    here: list[type[BaseModel]] = [Config]
    for part in location:
        tagged = [s for s in here if len(here) > 1 and part in get_args(s.model_fields["type"].annotation)]
        if tagged:
            here = tagged
            continue
        kept.append(part)
        if isinstance(part, str):
            here = [t for s in here if part in s.model_fields for t in _sections(s.model_fields[part].annotation)]
    return kept, here


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
