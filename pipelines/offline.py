"""Parts that another run made, drawn anew: where `dlma` and `self_contrast` take their pairs from with `pairs`."""

from collections.abc import Sequence
from itertools import groupby, islice

from pipelines.context import Context
from pipelines.method import Rollout
from plumbline.config.data import Source
from plumbline.data.length_filter import Fit
from plumbline.records import Message, Prompt
from plumbline.runs.preferences import check_model, read_table


class OfflinePairs:
    """Rows by prompt. Their log-probs are this π0's, so nothing is computed again.

    The rows stay as Arrow has them until a step draws them: as Python's lists their ids take ten times the memory.
    """

    def __init__(self, context: Context, source: Source, negatives: int | None = None) -> None:
        """
        Args:
            negatives: at most so many rows a prompt, its first ones; None: all.

        Raises:
            DataError: there are no pairs, or they are of another model.
        """
        self._table = read_table(source)
        check_model(source, self._table.column("model").unique().to_pylist(), context.fingerprint)
        self._negatives = negatives
        steps, ids, texts = (self._table.column(name).to_pylist() for name in ("step", "prompt_id", "prompt"))
        grouped = groupby(range(len(ids)), key=lambda i: (steps[i], ids[i]))
        self._rows = {f"{step}/{name}": list(own) for (step, name), own in grouped}
        self.fit = Fit(
            prompts=[
                Prompt(id=key, messages=(Message(role="user", content=texts[own[0]]),))
                for key, own in self._rows.items()
            ],
            unfit=[],
        )
        """What the steps draw from; the texts are only names here, the rows have the token ids."""

    def rollout(self, step: int, prompts: Sequence[Prompt]) -> Rollout:
        """The rows of these prompts."""
        wanted = [i for prompt in prompts for i in islice(self._rows[prompt.id], self._negatives)]
        rows = [{**row, "step": step} for row in self._table.take(wanted).to_pylist()]
        return Rollout(rows=rows, rejected=[], tokens=0)
