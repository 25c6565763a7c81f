"""What a learner's worker is fed by: the seam between it and the actors of a run."""

from collections.abc import Mapping
from typing import Any, Protocol

from actors.channel import Box, Lease
from actors.desk import Question
from plumbline.errors import PlumblineError
from plumbline.records import Publication, Sample


class Feed(Protocol):
    """Where parts and questions come from, and where versions go; the calls of a channel, a policy store and a desk,
    made blocking."""

    def acknowledged(self) -> int:
        """The step up to which no part comes again."""
        ...

    def attach(self, holder: str, done: int) -> None: ...

    def lease(self, holder: str) -> Lease | Question | None:
        """The next part, or what is asked of π0 before that is there; None after the last part."""
        ...

    def question(self, holder: str) -> Question | None:
        """What is asked of π0 now; returns at once."""
        ...

    def answer(self, number: int, holder: str, answer: Any, counts: Mapping[str, int]) -> None: ...

    def close(self, holder: str) -> None:
        """Nothing more can be asked of π0."""
        ...

    def peek(self, step: int) -> Box: ...

    def read(self, box: Box) -> list[Sample]: ...

    def ack(self, step: int, holder: str) -> None: ...

    def publish(self, publication: Publication) -> None: ...

    def fail(self, policy: str, error: PlumblineError) -> None: ...
