"""How many tokens each model of a run is given: `auto` becomes a number, and more than a model can read is refused."""

from collections.abc import Iterator
from dataclasses import dataclass

from plumbline.config.data import ClassifierReward
from plumbline.config.pipelines import RewardModel
from plumbline.config.section import Auto, replaced
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.models.positions import positions, read_config
from plumbline.runs.policies import model_path

MAX_LEN, REWARD_MAX_LEN, TRAINED_MAX_LEN = 1024, 512, 256
"""What `auto` is where a model can read as much: of `model`, of a classifier, and of one that is trained here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """A length of a config, and the most that its model can read; None: it has no limit."""

    key: str
    asked: int | Auto
    usual: int
    most: int | None

    @property
    def tokens(self) -> int:
        """Raises ConfigError where more is asked than the model can read."""
        if self.asked == "auto":
            return min(self.usual, self.most or self.usual)
        if self.most is not None and self.asked > self.most:
            raise ConfigError(f"{self.key}: {self.asked}, but its model reads {self.most} tokens at most; write auto")
        return self.asked

    def __str__(self) -> str:
        limit = f"of {self.most}" if self.most is not None else "(its model has no limit)"
        return f"{self.key} {self.tokens} {limit}"


def settle_lengths(config: Config, base: str | None = None) -> Config:
    """The config with a number in place of each length that is `auto`.

    Args:
        base: directory of π0, where that is another than `model.path`.

    Raises:
        ConfigError: a length is above what its model can read.
        ModelError: a model's config.json cannot be read.
    """
    for one in lengths_of(config, base):
        *section, name = [int(part) if part.isdigit() else part for part in one.key.split(".")]
        config = replaced(config, section, {str(name): one.tokens})
    return config


def lengths_of(config: Config, base: str | None = None) -> Iterator[Length]:
    """See `settle_lengths`. Raises ModelError."""
    most = _base_positions(config, base)
    yield Length(key="model.max_len", asked=config.model.max_len, usual=MAX_LEN, most=most)
    for i, one in enumerate(config.pipelines):
        if isinstance(one, RewardModel):
            yield Length(key=f"pipelines.{i}.max_len", asked=one.max_len, usual=TRAINED_MAX_LEN, most=most)
    for key, reward in config.rewards.items():
        if isinstance(reward, ClassifierReward):
            read = positions(read_config(model_path(reward.path), f"{key}.path"))
            yield Length(key=f"{key}.max_len", asked=reward.max_len, usual=REWARD_MAX_LEN, most=read)


def _base_positions(config: Config, base: str | None) -> int | None:
    path = base or config.model.path
    if path is not None:
        return positions(read_config(path, "model.path"))
    from transformers import AutoConfig

    return positions(AutoConfig.for_model(**(config.model.init or {})))
