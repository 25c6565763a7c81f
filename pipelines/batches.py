"""Samples that are there before training starts, a batch a step: what `sft` and `reward` train on."""

import random
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from plumbline.records import Sample, TokenGroup


class Batches(Sequence[list[Sample]]):
    """Every sample once an epoch, in an order of its own each epoch, `size` at a time.

    Numbers of tokens lie in arrays until a batch is asked for: as Python's lists of integers they take nine times the
    memory. Of a sample its group and its `rewards` are kept.
    """

    def __init__(self, samples: Iterable[Sample], size: int, epochs: int, seed: int) -> None:
        self._ids, self._ends, self._firsts = array("i"), array("q", [0]), array("q", [0])
        self._beside: list[list[dict[str, array[int]]]] = []
        self._rewards: list[tuple[float, ...]] = []
        for sample in samples:
            for ids in (sample.group.prompt_ids, *sample.group.response_ids):
                self._ids.extend(ids)
                self._ends.append(len(self._ids))
            self._firsts.append(len(self._ends) - 1)
            self._beside.append([{name: array("i", one) for name, one in own.items()} for own in sample.group.beside])
            self._rewards.append(sample.rewards)
        self._size, self._epochs, self._seed = size, epochs, seed
        self._orders: dict[int, list[int]] = {}

    @property
    def samples(self) -> int:
        """How many there are, an epoch."""
        return len(self._rewards)

    def __len__(self) -> int:
        return self._epochs * -(-self.samples // self._size)

    @overload
    def __getitem__(self, index: int) -> list[Sample]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Sample]]: ...

    def __getitem__(self, index: int | slice) -> list[Sample] | list[list[Sample]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        epoch, position = divmod(index % len(self), len(self) // self._epochs)
        return [self._sample(i) for i in self._order(epoch)[position * self._size : (position + 1) * self._size]]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self.samples))
            random.Random(f"{self._seed}-{epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]

    def _sample(self, i: int) -> Sample:
        first, end = self._firsts[i], self._firsts[i + 1]
        prompt, *responses = (self._ids[self._ends[k] : self._ends[k + 1]].tolist() for k in range(first, end))
        beside = [{name: one.tolist() for name, one in own.items()} for own in self._beside[i]]
        return Sample(group=TokenGroup(prompt, responses, beside), rewards=self._rewards[i])
