"""A learner's feed without Ray: parts that are all there, and what the learner did with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from actors.channel import Box, Lease
from actors.desk import Question
from plumbline.errors import PlumblineError
from plumbline.records import Publication, Sample


class Killed(BaseException):
    """The process ends, as by kill -9: nothing catches it."""


class MemoryFeed:
    """Parts that are all there; `dies_at` is the version whose publication kills the process.

    `early` are asked before the first part is there, `questions` between micro-batches.
    """

    def __init__(
        self,
        parts: Mapping[int, Sequence[Sample]],
        dies_at: int = 0,
        early: Sequence[Question] = (),
        questions: Sequence[Question] = (),
    ) -> None:
        self.parts = parts
        self.dies_at = dies_at
        self.early, self.questions = list(early), list(questions)
        self.answers: dict[int, Any] = {}
        self.counts: list[Mapping[str, int]] = []
        self.closed = False
        self.next = 0
        self.attached: list[int] = []
        self.acked: list[int] = []
        self.published: list[Publication] = []
        self.failures: list[tuple[str, PlumblineError]] = []

    def acknowledged(self) -> int:
        return max(self.acked, default=0)

    def attach(self, holder: str, done: int) -> None:
        self.attached.append(done)
        self.next = done + 1

    def lease(self, holder: str) -> Lease | Question | None:
        if self.early:
            return self.early.pop(0)
        if self.next not in self.parts:
            return None
        self.next += 1
        return Lease(step=self.next - 1, box=self.peek(self.next - 1), holder=holder)

    def question(self, holder: str) -> Question | None:
        return self.questions.pop(0) if self.questions else None

    def answer(self, number: int, holder: str, answer: Any, counts: Mapping[str, int]) -> None:
        self.answers[number] = answer
        self.counts.append(counts)

    def close(self, holder: str) -> None:
        self.closed = True

    def peek(self, step: int) -> Box:
        return Box(ref=self.parts[step])

    def read(self, box: Box) -> list[Sample]:
        return list(box.ref)

    def ack(self, step: int, holder: str) -> None:
        self.acked.append(step)

    def publish(self, publication: Publication) -> None:
        if publication.ref.version == self.dies_at:
            raise Killed
        self.published.append(publication)

    def fail(self, policy: str, error: PlumblineError) -> None:
        self.failures.append((policy, error))
