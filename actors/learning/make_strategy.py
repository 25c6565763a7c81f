"""Which strategy a config means. DeepSpeed is imported only where it is used."""

from typing import Literal

from actors.learning.policy import LearnedPolicy
from actors.learning.strategy import Strategy, TorchStrategy
from plumbline.config.learner import Learner
from plumbline.models.loading import Cut


def make_strategy(
    policy: LearnedPolicy,
    settings: Learner,
    dtype: Literal["float32", "bfloat16"],
    device: Literal["cpu", "cuda"],
    world: int,
) -> Strategy:
    """The strategy that the config names. Collective; the model that `policy` holds is the strategy's from now on."""
    if settings.strategy == "deepspeed":
        from actors.learning.strategy_deepspeed import DeepspeedStrategy

        return DeepspeedStrategy(policy, settings, dtype, device, world)
    return TorchStrategy(policy, settings, device, world)


def make_cut(settings: Learner, device: Literal["cpu", "cuda"]) -> Cut | None:
    """How a model is cut while it is loaded; None where the strategy wants it whole. Collective."""
    if settings.strategy == "deepspeed" and settings.zero == 3:
        from actors.learning.strategy_deepspeed import ZeroCut

        return ZeroCut(device)
    return None
