"""How many generators the pool should have: pure decisions, which `pipelines.crew` carries out."""

import math
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Scaler:
    """Follows the work between two bounds: up as soon as it waits too long, down one by one once it has been less.

    Attributes:
        low, high: bounds on the number of generators.
        up_after: seconds that requests may wait. Where there is no generator at all, waiting work starts one at once.
        down_after: seconds in which one generator less would have done.
    """

    low: int
    high: int
    up_after: float
    down_after: float
    _spare_since: float | None = None

    def wanted(self, *, there: int, demand: float, lag: float, now: float) -> int:
        """The number to have from now on.

        Args:
            there: generators that there are, or that are on their way.
            demand: generators that the work under way and the work that waits would fill.
            lag: seconds that the oldest waiting work has waited, 0 where none waits.
            now: seconds of a clock that only goes forward.
        """
        spare = lag == 0 and demand <= there - 1
        if not spare:
            self._spare_since = None
        elif self._spare_since is None:
            self._spare_since = now
        if lag > 0 and (there == 0 or lag >= self.up_after):
            there = max(there, math.ceil(demand))
        elif self._spare_since is not None and now - self._spare_since >= self.down_after:
            self._spare_since = now
            there -= 1
        return min(max(there, self.low), self.high)
