"""The section of a config that says how users reach the policies: where, who may, how much, and what is promoted."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plumbline.config.section import Count, Resources, Section

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


class Limits(Section):
    """What one request may ask for; beyond it comes 400, 408, 413 or 429."""

    body_bytes: Count = Field(default=2**20, description="of a request")
    body_s: float = Field(default=30, gt=0, description="seconds in which it must be there; beyond it 408")
    messages: Count = Field(default=256, description="of a conversation, or prompts of a completion")
    n: Count = Field(default=8, description="answers to one prompt")
    in_flight: Count = Field(
        default=64, description="requests being answered, three quarters of them of one caller; beyond it 429"
    )
    answers: Count = Field(default=1024, description="the same for their answers, which are prompts times `n`")
    tokens: Count = Field(default=2**20, description="the same for the tokens that these may become, by `max_tokens`")


class Gate(Section):
    """When a proved version is promoted: figures on held-out prompts, against the promoted one and against π0.

    A figure that the run cannot measure, such as a gap without a principle, is not looked at.
    """

    every: Count = Field(default=4, description="look at each version whose number it divides, and at the last")
    prompts: Count = Field(default=64, description="held-out prompts, the first of `data.heldout`")
    max_reward_drop: float = Field(default=0.0, ge=0, description="below the promoted version's mean reward")
    max_gap_rise: float | None = Field(default=None, ge=0, description="above the promoted version's; default: any")
    max_ppl_rise: float = Field(default=0.25, ge=0, description="share above π0's perplexity of the targets")
    length: tuple[Annotated[float, Field(ge=0)], float] = Field(
        default=(0.5, 2.0), description="least and most mean length, as shares of π0's"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Gate":
        if not self.length[0] < self.length[1]:
            raise ValueError(f"`length` is {list(self.length)}; the first should be the smaller")
        return self


class Serve(Section):
    """An OpenAI endpoint over a run's policies, while it trains or after."""

    enabled: bool = Field(default=False, description="serve while the run trains; `plumbline serve` needs no such key")
    placement: Literal["pool", "replicas"] = Field(
        default="pool", description="users at the run's own generators, before its rollouts; or engines of their own"
    )
    host: str = Field(default="127.0.0.1", description="address to bind; another than localhost needs API keys")
    port: int = Field(default=8000, ge=1, le=65535, description="where `/v1` answers")
    api_keys: str | None = Field(
        default=None, description="file with a key a line; default: the variable PLUMBLINE_API_KEYS, parted by commas"
    )
    replicas: Count | tuple[Count, Count] = Field(
        default=1, description="engines of `placement: replicas`; a pair are bounds between which they scale with load"
    )
    resources: Resources = Field(default={})
    seats: Count = Field(default=16, description="users' answers that an engine decodes beside the rollouts")
    pinned: Count = Field(default=4, description="versions, beside the newest, that an engine keeps for users")
    limits: Limits = Limits()
    gate: Gate | None = Field(default=None, description="default: each proved version is promoted")

    @model_validator(mode="after")
    def _bounds(self) -> "Serve":
        if isinstance(self.replicas, tuple) and self.replicas[0] > self.replicas[1]:
            raise ValueError(f"`replicas` is {list(self.replicas)}; the first should not be the larger")
        return self

    @property
    def most_replicas(self) -> int:
        """Engines of its own at full load."""
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas
