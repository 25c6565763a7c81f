"""The sections of a config that say what comes from outside a run: the base model, the rows, the rewards."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from plumbline.config.hub import Revision
from plumbline.config.reading import OnBad, Reading
from plumbline.config.section import Count, Json, MaxLen, Name, Section, Tokens


class Model(Section):
    """The base model: one that is there (`path`) or a randomly initialised one (`init`, needs `tokenizer`). A hub name,
    `ORG/MODEL` of the Hugging Face hub, may stand wherever no directory is called so."""

    path: str | None = Field(
        default=None,
        description="directory or hub name of a transformers causal language model in safetensors; or a GGUF file, or "
        "what `plumbline fetch` has, which are made into one",
    )
    revision: Revision = Field(
        default=None, description="of a hub name: branch, tag or commit; default: its main branch"
    )
    adapter: str | None = Field(
        default=None,
        min_length=1,
        description="directory or hub name of a PEFT LoRA adapter on `path`, merged into it when the run begins",
    )
    adapter_revision: Revision = Field(default=None, description="as `revision`, of `adapter`")
    init: Json | None = Field(default=None, description="a transformers config (`model_type`, …), random weights")
    tokenizer: str | None = Field(default=None, description="directory or hub name of the tokenizer; default: `path`")
    tokenizer_revision: Revision = Field(default=None, description="as `revision`, of `tokenizer`")
    chat_template: str | None = Field(
        default=None, description="`chatml`, `plain`, or a Jinja file; default: the tokenizer's"
    )
    template_args: dict[str, bool | int | float | str] = Field(
        default={}, description="variables that the chat template reads, such as {enable_thinking: false}"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: float32 on CPUs, else bfloat16"
    )
    max_len: MaxLen = Field(
        default="auto",
        description="tokens of a prompt and its response together; auto: 1024, or what the model reads if that is less",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of `path` (a model directory) and `init` (a config, random weights)")
        if self.init is not None and self.adapter is not None:
            raise ValueError("`adapter` changes a model that is there; give `path` (its base) in place of `init`")
        if self.init is not None and (self.tokenizer is None or "model_type" not in self.init):
            raise ValueError("`init` needs `model_type` in it and `tokenizer` beside it")
        return self

    def at(self, directory: str) -> "Model":
        """This model where it lies in a run: itself, or what was made of it, which has a tokenizer of its own."""
        made: dict[str, str | None] = {"adapter": None, "adapter_revision": None}
        if directory != self.path:
            made |= {"path": directory, "revision": None, "init": None, "tokenizer": None, "tokenizer_revision": None}
        return self.model_copy(update=made)

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
    note: str = Field(default="", description="what a reader of the report should know of the rows, in a sentence")

    @property
    def reading(self) -> Reading:
        """What the readers take beside the path."""
        return Reading(columns=self.columns, where=self.where, split=self.split, limit=self.limit)

    def reading_past(self, on_bad: OnBad) -> Reading:
        """`reading`, in which bad rows go to `on_bad`."""
        return {**self.reading, "on_bad": on_bad}


class Data(Section):
    """What the run learns on, and what it is judged on."""

    train: Source = Field(description="what the pipelines draw prompts, targets and pairs from")
    heldout: Source | None = Field(default=None, description="what `evaluation` asks; no training sees it")
    max_prompt_tokens: Count = Field(
        default=256, description="longer prompts are counted and listed in rejected.parquet"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop",
        description="a row that cannot be used ends the start, or is left out, told, and listed in rejected.parquet",
    )
    max_bad_rows: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of a file's rows that `skip` may leave out",
    )

    @property
    def bad_allowed(self) -> float | None:
        """The share of bad rows that a file may have; None where the first one ends the start."""
        return self.max_bad_rows if self.on_bad_row == "skip" else None


class RewardBase(Section):
    """What every reward has that gives scores itself."""

    max_failed: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of its last 100 batches' answers that it may fail on, and that are rejected; above it, the "
        "pipeline ends",
    )


class ClassifierReward(RewardBase):
    """A Hugging Face sequence classifier. Two labels: log-odds of the second; one label: its value."""

    type: Literal["classifier"]
    path: str = Field(
        description="its directory or hub name, or the directory of a `reward` pipeline's policy: the newest version "
        "is taken"
    )
    revision: Revision = Field(
        default=None, description="of a hub name: branch, tag or commit; default: its main branch"
    )
    reads: Literal["response", "pair", "conversation"] = Field(
        default="response",
        description="the answer alone, (query, answer) as a text pair, or the chat template's rendering",
    )
    max_len: Tokens = Field(
        default="auto",
        description="tokens; longer inputs are cut, and counted; auto: 512, or what it reads if that is less",
    )
    batch_tokens: Count = Field(default=8192, description="tokens of one forward, padding included")


class ProgramReward(RewardBase):
    """A Python function ``(Sequence[ScoreRequest]) -> list[float]``, named `module:function`."""

    type: Literal["program"]
    function: str = Field(pattern=r"^[\w.]+:\w+$", description="importable from the working directory")


class ServiceReward(RewardBase):
    """What rewards behind HTTP have. What stays without a score is rejected with its reason."""

    url: str = Field(pattern=r"^https?://[^\s/]", description="where it listens")
    key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_]\w*$",
        description="the environment variable with its API key, here and on the nodes that scorers run on",
    )
    timeout_s: float = Field(default=60, gt=0, le=86_400, description="of one request")
    retries: int = Field(default=5, ge=0, le=100, description="of a request that failed and may succeed later")
    backoff_s: float = Field(
        default=1, ge=0, le=60, description="before the first retry; doubled with each, to a minute"
    )
    concurrency: Count = Field(default=16, description="requests under way at once, of each scorer")
    per_minute: float | None = Field(default=None, gt=0, le=1e9, description="requests that each scorer may start")
    cache: bool = Field(default=True, description="keep scores by content, and ask for none twice")

    @model_validator(mode="after")
    def _no_secret(self) -> "ServiceReward":
        if "@" in urlsplit(self.url).netloc:
            raise ValueError(
                "`url` holds a password, which a run would keep in its config.yaml; `key_env` names a variable"
            )
        return self


class HttpReward(ServiceReward):
    """A service that scores batches of queries and answers: see `plumbline.models.services.HttpService`."""

    type: Literal["http"]
    batch_size: Count = Field(default=16, description="answers of one request")


class JudgeReward(ServiceReward):
    """A chat model behind any OpenAI-compatible endpoint, which gives each answer a number by a rubric: the mean of the
    numbers under its probabilities."""

    type: Literal["judge"]
    url: str = Field(pattern=r"^https?://[^\s/]", description="the endpoint's base, such as http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="its name there")
    rubric: str = Field(min_length=1, description="what makes an answer good, in words")
    levels: int = Field(default=5, ge=2, le=9, description="the best number; the worst is 1")
    logprobs: bool = Field(default=True, description="false: the number that it writes, where it gives no log-probs")


SingleReward = Annotated[ClassifierReward | ProgramReward | HttpReward | JudgeReward, Field(discriminator="type")]


def _counts(weight: float) -> float:
    if weight == 0:
        raise ValueError("a part of weight 0 is asked for nothing; give another number, or leave the part out")
    return weight


class RewardPart(Section):
    """One of the rewards that a sum is made of."""

    reward: SingleReward
    weight: Annotated[float, AfterValidator(_counts)] = Field(
        default=1.0, description="what its scores count times, any number but 0; below 0 they are a penalty"
    )
    name: Name = Field(
        default_factory=lambda read: read["reward"].type,
        description="what its figures are called; default: its reward's `type`",
    )


class SumReward(Section):
    """Several rewards, each asked about every answer: the score is the sum of theirs, each times its weight."""

    type: Literal["sum"]
    of: list[RewardPart] = Field(min_length=1, description="the rewards; none of them is a sum again")

    @model_validator(mode="after")
    def _told_apart(self) -> "SumReward":
        names = [one.name for one in self.of]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two parts are named {min(repeated)!r}; give each a `name` of its own")
        return self


Reward = Annotated[ClassifierReward | ProgramReward | HttpReward | JudgeReward | SumReward, Field(discriminator="type")]


def reward_parts(reward: Reward | None, key: str) -> dict[str, RewardPart]:
    """The rewards that give the scores, by their keys in a config: the parts of a sum, or the reward of `key` alone."""
    if isinstance(reward, SumReward):
        return {f"{key}.of.{i}.reward": part for i, part in enumerate(reward.of)}
    return {key: RewardPart(reward=reward)} if reward else {}
