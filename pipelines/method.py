"""What every method that samples has in common: its prompts, its requests to the pool, its parts and rejections.

A method (`ple`, `dlma`, `self_contrast`, `raft`) inherits this and says what it asks of a chunk of prompts and what
rows come of the answers. `pipelines.loop` runs it.
"""

import asyncio
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from actors.scorer import Query
from actors.spawn import ask
from pipelines.context import Context
from pipelines.rewarding import Rewarding
from plumbline.config.learner import FullPolicy
from plumbline.config.pipelines import Frozen, MethodSection
from plumbline.data.ending import encode_responses
from plumbline.data.length_filter import Fit, Unfit
from plumbline.data.prompting import render_all
from plumbline.errors import RunError
from plumbline.records import GenerateRequest, Generation, PolicyRef, Prompt, Sample, Sampling
from plumbline.runs.pairs import Answer
from plumbline.runs.parts import Parts, Rejected
from plumbline.runs.rollouts import prompt_text, with_parts

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What one step drew: rows for its part, rows for `rejected.parquet`, and how many tokens were sampled."""

    rows: list[dict[str, object]]
    rejected: list[dict[str, object]]
    tokens: int


class Method(ABC):
    """A method's prompts, parts and requests.

    Args:
        room: directory of the run that its parts go to, `rollouts` or `pairs`.
        fit: what it draws from, and what it cannot use, for `rejected.parquet`.
    """

    def __init__(
        self,
        context: Context,
        section: MethodSection,
        room: str,
        schema: pa.Schema,
        fit: Fit,
    ) -> None:
        self._context = context
        self._section = section
        directory = self.directory = context.run_dir / room / section.name
        self.name = section.name
        self.keep_versions = section.keep_versions
        self.reward = Rewarding(context, section.name, context.config.reward)
        self.parts = Parts(str(directory), with_parts(schema, self.reward.names))
        self.rejected = Rejected(str(directory / "rejected.parquet"))
        self.commits: set[asyncio.Task[None]] = set()  # that are being written
        self._luck = section.draws_as or section.name
        self._prompts = fit.prompts
        self._orders: dict[int, list[int]] = {}
        if 0 not in self.rejected.steps():
            self.rejected.add(0, [_unfit_row(one) for one in fit.unfit])
        per_pass = batch_count(len(self._prompts), section.batch_size)
        self.part_count = section.steps or per_pass
        self.total = self.part_count * (section.epochs if isinstance(section, Frozen) else 1)
        self.displaces_base = isinstance(section, Frozen) and isinstance(section.policy, FullPolicy)
        ahead = section.ahead if isinstance(section, Frozen) else getattr(section, "max_staleness", 0) + 1
        self._in_turn = context.config.deterministic
        self.slots = 1 if self._in_turn else ahead  # steps that may be between draw and proof
        settings = section.generation
        self._sampling = Sampling(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=tuple(settings.stop),
        )

    def ref(self, proved: int) -> PolicyRef:
        """Which weights the next part is drawn from: π0, whatever version is `proved`."""
        return PolicyRef()

    def part(self, step: int) -> int:
        """The part that a step of the learner trains on: later epochs read the parts again."""
        return (step - 1) % self.part_count + 1

    async def roll_out(self, step: int, ref: PolicyRef) -> Rollout:
        """Draw the step's prompts and answers, a chunk at a time, all chunks at once. Of a deterministic run one after
        another: an engine's sums depend on what it decodes together."""
        prompts, size = self._draw(step), max(1, self._context.pool.batch // self._section.answers)
        turns = asyncio.Semaphore(1 if self._in_turn else len(prompts))

        async def one(chunk: Sequence[Prompt]) -> Rollout:
            async with turns:
                return await self._roll_chunk(step, ref, chunk)

        async with asyncio.TaskGroup() as chunks:
            tasks = [chunks.create_task(one(prompts[i : i + size])) for i in range(0, len(prompts), size)]
        done = [task.result() for task in tasks]
        return Rollout(
            rows=[row for one in done for row in one.rows],
            rejected=[row for one in done for row in one.rejected],
            tokens=sum(one.tokens for one in done),
        )

    @abstractmethod
    async def _roll_chunk(self, step: int, ref: PolicyRef, prompts: Sequence[Prompt]) -> Rollout:
        """Answers of `ref` to some prompts of a step, as rows of its part."""

    @abstractmethod
    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """The training examples in the rows of a part."""

    @abstractmethod
    def describe(self, rows: Sequence[Row]) -> dict[str, float]:
        """Figures of a committed part, for its event."""

    def _draw(self, step: int) -> list[Prompt]:
        """The step's prompts: the same at every call, each once a pass, in an order that changes with the pass."""
        size, count = self._section.batch_size, len(self._prompts)
        pass_, position = divmod(step - 1, batch_count(count, size))
        if pass_ not in self._orders:
            order = list(range(count))
            random.Random(f"{self._context.config.seed}-{self._luck}-{pass_}").shuffle(order)
            self._orders = {pass_: order}  # of many prompts it takes as long as a step
        return [self._prompts[i] for i in self._orders[pass_][position * size : (position + 1) * size]]

    async def _requests(
        self, step: int, prompts: Sequence[Prompt], ref: PolicyRef, steering: Mapping[str, str | None], n: int = 1
    ) -> list[GenerateRequest]:
        """One for each prompt and each kind of `steering`: all of a prompt, then those of the next."""
        asked = [(prompt, kind, text) for prompt in prompts for kind, text in steering.items()]
        rendered = await self._rendered([(prompt, text) for prompt, _, text in asked])
        return [
            GenerateRequest(
                key=f"{step}/{prompt.id}/{kind}",
                prompt_ids=ids,
                ref=ref,
                sampling=self._sampling,
                seed=zlib.crc32(f"{self._context.config.seed}/{self._luck}/{step}/{prompt.id}/{kind}".encode()) >> 1,
                n=n,
            )
            for (prompt, kind, _), ids in zip(asked, rendered, strict=True)
        ]

    async def _generated(self, requests: Sequence[GenerateRequest], *then: Callable[[Any], Any]) -> list[Any]:
        """Answers to `requests` from the pool, and what each of `then` made of them.

        `then` are calls of scorers and the like, given the answers' ref, unread. The place in the pool is free again as
        soon as the answers are there.
        """

        async def question(generator: Any) -> tuple[list[Generation], list[Any]]:
            answers = generator.generate.remote(list(requests))
            made = [one(answers) for one in then]
            return await ask(answers), made

        answers = sum(request.n for request in requests)
        tokens = sum(request.n * request.sampling.max_tokens for request in requests)
        generations, made = await self._context.pool.ask(self.name, answers, tokens, question, self._section.share)
        self._context.pool.count(self.name, sum(one.tokens for one in generations))
        return [generations, *[await ask(one) for one in made]]

    def _score_calls(self, queries: Sequence[Query]) -> list[Callable[[Any], Any]]:
        """Calls of all that gives scores, for `_generated`; `queries` stand as its requests do."""
        return [partial(one.score_generations.remote, queries) for one in self.reward.scorers()]

    def _queries(self, prompts: Sequence[Prompt]) -> list[Query]:
        return [Query(messages=p.messages, extra=dict(p.extra)) for p in prompts]

    async def _rendered(self, asked: Sequence[tuple[Prompt, str | None]]) -> list[list[int]]:
        """Token ids of prompts with what steers them. The pipelines' loop goes on meanwhile."""
        return await asyncio.to_thread(
            render_all, self._context.tokenizer, [(prompt.messages, text) for prompt, text in asked]
        )

    async def _answers(self, texts: Sequence[str]) -> list[Answer]:
        """Texts that nobody sampled, as sides of pairs."""
        ids = await asyncio.to_thread(encode_responses, self._context.tokenizer, texts)
        return [Answer(text=text, ids=own) for text, own in zip(texts, ids, strict=True)]


def batch_count(items: int, size: int) -> int:
    """Batches of at most `size` that hold `items`. Raises RunError where there is nothing."""
    if items == 0:
        raise RunError("no prompt is left to train on: all were rejected (see rejected.parquet)")
    return -(-items // size)


def rejected_row(step: int, prompt: Prompt, reason: str, detail: str = "") -> dict[str, object]:
    """One row of `rejected.parquet`."""
    return {"step": step, "prompt_id": prompt.id, "prompt": prompt_text(prompt), "reason": reason, "detail": detail}


def _unfit_row(unfit: Unfit) -> dict[str, object]:
    return rejected_row(0, unfit.prompt, unfit.reason, unfit.detail)
