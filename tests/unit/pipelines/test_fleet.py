"""The fleet's processes that start while `sft` trains: where there is room, and in what order."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import fleet


class Context:
    """What `place_early` reads of a context, and what it did."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.did: list[str] = []
        self.config = None
        self.events = SimpleNamespace(say=self.did.append)
        self.fleet = SimpleNamespace(warm=lambda: self.did.append("warm"))


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        ({"CPU": 4.0, "GPU": 2.0}, ["place model/later", "warm"]),
        ({"CPU": 9.0, "GPU": 9.0, "memory": 1.0}, ["place model/later", "warm"]),
        ({"CPU": 4.0, "GPU": 1.5}, ["the fleet starts when sft has ended: there is no GPU for both at once"]),
        ({"CPU": 4.0}, ["the fleet starts when sft has ended: there is no GPU for both at once"]),
    ],
)
def test_the_fleet_starts_beside_sft_only_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, offered: Mapping[str, float], expected: list[str]
) -> None:
    context: Any = Context("cuda")
    monkeypatch.setattr(fleet, "free", lambda: offered)
    monkeypatch.setattr(fleet, "beside_sft", lambda _: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr(fleet, "place_fleet", lambda c, path, train: c.did.append(f"place {path}"))
    fleet.place_early(context, "model/later")
    assert context.did == expected
    on_cpus: Any = Context("cpu")
    fleet.place_early(on_cpus, "model/later")
    assert on_cpus.did == [], "there its processes would take the learner's time"
