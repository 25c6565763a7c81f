"""Weights that lie in memory for other processes: here a CPU's, which can be opened once; cards are in `tests/gpu`."""

import pickle
import subprocess
import sys
from dataclasses import replace

import torch

from plumbline.models.ipc import Shelf, card_of, open_shared

CPU = torch.device("cpu")
WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([7.0]), "c": torch.tensor(8.0)}


def test_what_is_laid_out_is_read_by_name_and_shape() -> None:
    shared = Shelf(CPU).lay(WEIGHTS.items())
    found = dict(open_shared(shared, CPU) or ())
    assert list(found) == list(WEIGHTS) and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def test_the_next_version_lies_where_the_last_one_did() -> None:
    shelf = Shelf(CPU)
    first, second = shelf.lay(WEIGHTS.items()), shelf.lay((name, w + 1) for name, w in WEIGHTS.items())
    assert first == second
    weights = open_shared(first, CPU)
    assert weights is not None
    name, read = next(weights)
    assert torch.equal(read, WEIGHTS[name] + 1), "a reader that is late reads the next version, and must notice"
    shelf.lay(WEIGHTS.items())
    assert torch.equal(read, WEIGHTS[name] + 1), "a copy"
    assert torch.equal(next(weights)[1], WEIGHTS["b.bias"])


def test_what_is_on_another_card_is_not_read() -> None:
    shared = Shelf(CPU).lay(WEIGHTS.items())
    assert shared.card == card_of(CPU)
    assert open_shared(replace(shared, card="GPU-of-another"), CPU) is None


def test_what_a_learner_left_that_has_died_is_not_read() -> None:
    code = """
import pickle, sys, torch
from plumbline.models.ipc import Shelf
torch.multiprocessing.set_sharing_strategy("file_system")
sys.stdout.buffer.write(pickle.dumps(Shelf(torch.device("cpu")).lay([("a", torch.ones(3))])))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert open_shared(pickle.loads(said), CPU) is None
