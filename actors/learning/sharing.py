"""Whether a learner's versions are laid out in its card's memory, for engines on it (`plumbline.models.ipc`)."""

from typing import TYPE_CHECKING, Any

from plumbline.config.learner import FullPolicy
from plumbline.config.section import planned

if TYPE_CHECKING:
    from plumbline.config.pipelines import Pipeline


def shares_weights(section: "Pipeline", publishes: str, device: str, model: Any, world: int) -> bool:
    """Whether whole weights are laid out for engines that may be on this worker's card.

    Not on a card of its own; not what is merged from an adapter, or named otherwise in its files.
    """
    whole = isinstance(getattr(section, "policy", None), FullPolicy) and publishes == "full"
    beside = device == "cuda" and planned(section.learner.gpus) < 1
    return whole and beside and world == 1 and not getattr(model, "_weight_conversions", None)
