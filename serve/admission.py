"""How much may be under way at once, of all callers and of one: requests, answers and tokens."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from plumbline.config.serving import Limits
from serve.errors import ApiError

SHARE = 0.75
"""What one caller may have of each bound: the rest is there for others."""
UNNAMED_TOKENS = 1024
"""What an answer counts whose request does not say how long it may become."""


def amounts(body: Mapping[str, Any]) -> dict[str, int]:
    """What a checked body asks for: answers are its prompts times `n`, tokens the most that these may become."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    answers = prompts * max(body.get("n", 1), body.get("best_of", 1))
    longest = body.get("max_completion_tokens", body.get("max_tokens", UNNAMED_TOKENS))
    return {"requests": 1, "answers": answers, "tokens": answers * longest}


class Admission:
    """What is under way, against `serve.limits`."""

    def __init__(self, limits: Limits) -> None:
        self._bounds = {"requests": limits.in_flight, "answers": limits.answers, "tokens": limits.tokens}
        self._all: Counter[str] = Counter()
        self._callers: dict[str, Counter[str]] = {}

    @property
    def requests(self) -> int:
        """How many are being answered."""
        return self._all["requests"]

    def enter(self, caller: str, asked: Mapping[str, int]) -> Callable[[], None]:
        """Count a request.

        Returns:
            To be called once, when it was answered or its user has hung up.

        Raises:
            ApiError: 400 where it alone is more than one caller may have, 429 where there is no room now.
        """
        own = self._callers.get(caller, Counter())
        for what, bound in self._bounds.items():
            most = max(1, -int(-bound * SHARE // 1))
            if asked[what] > most:
                said = f"This request asks for {asked[what]} {what}; this server takes {most} of one caller at once."
                raise ApiError(400, said)
            if own[what] + asked[what] > most or self._all[what] + asked[what] > bound:
                said = f"This server answers {bound} {what} at once, {most} of one caller; try again."
                raise ApiError(429, said, code="rate_limit_exceeded", retry_after=1)
        self._all.update(asked)
        self._callers.setdefault(caller, Counter()).update(asked)
        return partial(self._leave, caller, asked)

    def _leave(self, caller: str, asked: Mapping[str, int]) -> None:
        self._all.subtract(asked)
        self._callers[caller].subtract(asked)
        if not self._callers[caller]["requests"]:
            del self._callers[caller]
