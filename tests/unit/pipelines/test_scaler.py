"""How many generators there should be: up on lag, down when less would do, never beyond the bounds."""

from dataclasses import dataclass

import pytest

from pipelines.autoscaler import Scaler


@dataclass
class Clocked:
    """A scaler whose decisions are carried out at once, and a clock."""

    scaler: Scaler
    there: int
    now: float = 100.0

    def after(self, seconds: float, *, demand: float, lag: float = 0.0) -> int:
        """Look once a second for so long, at a load that does not change; returns how many there are then."""
        for _ in range(max(1, round(seconds))):
            self.now += 1 if seconds else 0
            self.there = self.scaler.wanted(there=self.there, demand=demand, lag=lag, now=self.now)
        return self.there


def clocked(low: int, high: int, there: int) -> Clocked:
    return Clocked(Scaler(low=low, high=high, up_after=5, down_after=60), there)


def test_a_fixed_number_stays_and_is_restored() -> None:
    one = clocked(2, 2, 2)
    assert one.after(200, demand=9, lag=30) == 2
    assert one.after(200, demand=0) == 2
    one.there = 1
    assert one.after(1, demand=0) == 2, "one is gone for good"


def test_up_only_once_work_has_waited_long_enough() -> None:
    one = clocked(1, 4, 1)
    assert one.after(1, demand=1.5, lag=4.9) == 1
    assert one.after(1, demand=1.5, lag=5.0) == 2


@pytest.mark.parametrize(("demand", "wanted"), [(1.2, 2), (2.0, 2), (2.5, 3), (50, 4)])
def test_as_many_as_the_work_fills_at_most_the_upper_bound(demand: float, wanted: int) -> None:
    assert clocked(1, 4, 1).after(1, demand=demand, lag=6) == wanted


def test_those_on_their_way_are_not_asked_for_again() -> None:
    one = clocked(0, 8, 1)
    assert one.after(30, demand=2.5, lag=10) == 3


def test_from_none_at_once() -> None:
    one = clocked(0, 4, 0)
    assert one.after(300, demand=0) == 0
    assert one.after(0, demand=0.01, lag=0.001) == 1


def test_down_one_by_one_once_less_would_have_done() -> None:
    one = clocked(1, 4, 4)
    assert one.after(59, demand=0.5) == 4
    assert one.after(2, demand=0.5) == 3
    assert one.after(60, demand=0.5) == 2
    assert one.after(600, demand=0.5) == 1


def test_to_none_only_without_any_work() -> None:
    one = clocked(0, 4, 1)
    assert one.after(600, demand=0.01) == 1
    assert one.after(61, demand=0) == 0


def test_a_moment_of_work_starts_the_wait_anew() -> None:
    one = clocked(0, 2, 1)
    for _ in range(10):
        assert one.after(50, demand=0) == 1
        assert one.after(1, demand=0.2) == 1
    assert one.after(61, demand=0) == 0


def test_waiting_work_keeps_them_even_where_little_is_under_way() -> None:
    assert clocked(1, 4, 3).after(600, demand=1.5, lag=0.1) == 3
