"""Parts that another run made, drawn anew: where `dlma` and `self_contrast` take their pairs from with `pairs`."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from pipelines.context import Context
from pipelines.method import Rollout
from plumbline.config.data import Source
from plumbline.records import Message, Prompt
from plumbline.runs.preferences import check_model, read_parts


class OfflinePairs:
    """Rows by prompt. Their log-probs are this π0's, so nothing is computed again."""

    def __init__(self, context: Context, source: Source) -> None:
        """Raises DataError: there are no pairs, or they are of another model."""
        rows = read_parts(source)
        check_model(source, rows, context.fingerprint)
        grouped = groupby(rows, key=lambda row: f"{row['step']}/{row['prompt_id']}")
        self._rows: dict[str, list[Mapping[str, Any]]] = {key: list(own) for key, own in grouped}

    @property
    def prompts(self) -> list[Prompt]:
        """What the steps draw from; the texts are only names here, the rows have the token ids."""
        return [
            Prompt(id=key, messages=(Message(role="user", content=own[0]["prompt"]),))
            for key, own in self._rows.items()
        ]

    def rollout(self, step: int, prompts: Sequence[Prompt]) -> Rollout:
        """The rows of these prompts."""
        rows = [{**row, "step": step} for prompt in prompts for row in self._rows[prompt.id]]
        return Rollout(rows=rows, rejected=[], tokens=0)
