"""How busy the pool is, while generators join it, leave it and are started again."""

import pytest

from pipelines.monitor import busy_share


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ({"a": 1.0, "b": 0.0}, {"a": 3.0, "b": 4.0}, 0.75),
        ({"a": 1.0}, {"a": 3.0, "new": 50.0}, 0.5),
        ({"a": 1.0, "gone": 9.0}, {"a": 3.0}, 0.5),
        ({"a": 90.0, "b": 1.0}, {"a": 0.5, "b": 5.0}, 0.5),  # a was started again
        ({"a": 1.0}, {"a": 6.0}, 1.0),
        ({}, {"new": 2.0}, 0.0),
        ({}, {}, 0.0),
    ],
)
def test_the_mean_share_of_those_that_were_there_all_the_time(
    before: dict[str, float], after: dict[str, float], share: float
) -> None:
    assert busy_share(before, after, seconds=4.0) == share
