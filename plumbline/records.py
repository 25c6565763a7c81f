"""The frozen records that cross process borders. No tensors, no handles: plain values that pickle small and fast.

Token ids are plain lists of int, log-probs are natural logarithms, and a *version* counts a policy's updates: 0 is the
policy that training starts from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation. Example: ``Message(role="user", content="Why is the sky blue?")``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a dataset: a conversation that ends with a user's turn, and what is known of its answers.

    `row` is its number in the file, by which messages name it. Example:
    ``Prompt(id="7", messages=(Message(role="user", content="Hi"),), target="Hello.")``
    """

    id: str
    messages: tuple[Message, ...]
    target: str | None = None
    chosen: str | None = None
    rejected: tuple[str, ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)
    row: int = field(default=0, compare=False)

    @property
    def query(self) -> str:
        """Text of the last user turn."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """One prompt with its K responses, as token ids: the only shape that the learner sees (METHODS.md §0).

    An EOS that the model produced itself is part of its response. Example: ``TokenGroup([5, 6], [[7, 2], [8, 9, 2]])``

    `beside` is for classifiers: what their tokenizer returned of each response beside its ids, by name, a number a
    token, such as which of two segments it is of. Empty where there is nothing.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    beside: Sequence[Mapping[str, list[int]]] = ()

    @property
    def tokens(self) -> int:
        """Tokens that a shared-prefix forward computes: the prompt once, every response once."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample: at most `max_tokens` new tokens; `stop` strings end a response and are stripped from its text."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


def public_name(policy: str) -> str:
    """A policy's name as users write it."""
    return policy.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRef:
    """Which weights answer. ``PolicyRef(policy="ple", version=12)``; version 0 of any policy is the base model."""

    policy: str = "base"
    version: int = 0

    def __str__(self) -> str:
        return f"{self.policy}@{self.version}"

    @property
    def public(self) -> str:
        """What users call it: ``self-contrast@16``, or ``base``."""
        return f"{public_name(self.policy)}@{self.version}" if self.version else "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """`n` samples of one tokenised prompt from one version. Sample i is drawn with seed ``seed + i``."""

    key: str
    prompt_ids: list[int]
    ref: PolicyRef
    sampling: Sampling
    seed: int
    n: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response: `text` without special tokens and stop strings, `ids` with EOS iff the model ended it."""

    text: str
    ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a generator answers to one `GenerateRequest`: the samples, who drew them and from which version."""

    key: str
    ref: PolicyRef
    engine: str
    completions: tuple[Completion, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(one.ids) for one in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRequest:
    """A user's request in OpenAI's form, for one version: `body` as it came, checked, without the model's name.

    `digest` is the version's (`plumbline.runs.policies.version_digest`): weights that were remade under its name are
    others. `caller` tells users apart, and is neither a key nor an address.
    """

    kind: Literal["chat", "completion"]
    body: Mapping[str, object]
    ref: PolicyRef
    digest: str = ""
    caller: str = ""

    @property
    def streams(self) -> bool:
        """Whether the answer is an event stream."""
        return bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What comes before the body of an answer to a user: an HTTP status, and whether an event stream follows."""

    status: int
    streams: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A query and one answer to it, for a reward model. The reward sees the plain query, never a principle."""

    messages: tuple[Message, ...]
    response: str
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training example: a group and the constants that its loss needs, one per response where not said otherwise.

    `rewards` are PLE's (s, s') [K] · a reward model's label [1]. `ref_logps` [K] are DPO's, the chosen response first;
    `margins` [K-1] DLMA's R of each rejected one. Empty where a method has none. `step` is the part.
    """

    group: TokenGroup
    rewards: tuple[float, ...] = ()
    ref_logps: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeights:
    """Whole weights in a learner's memory on a card, for the other processes of that card (`plumbline.models.ipc`).

    `handle` opens that memory; in it the tensors lie one behind the other, in the order of `shapes`.
    """

    card: str
    handle: bytes
    shapes: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One published version: its files, and the learner's own log-probs of the probe, which every engine must match.

    `files` are an adapter's. A whole model is too large to be handed from process to process: `directory` says where
    its files lie, for who sees that place, `files` has them only where they had to be sent, and `shared` says where
    they are for processes that are on the learner's card.
    `probe_logps` [N] are means over tokens, one a probe response; `previous_probe_logps` [N] those of version - 1
    and `base_probe_logps` [N] those of version 0, computed by the same learner. `digests` are those of its tensors
    (`plumbline.models.digest`): by the dtype that an engine computes in, then by name. `metrics` are the learner's for
    the step that made this version.
    """

    ref: PolicyRef
    files: Mapping[str, bytes]
    probe_logps: Sequence[float]
    previous_probe_logps: Sequence[float]
    base_probe_logps: Sequence[float]
    directory: str | None = None
    shared: SharedWeights | None = None
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
