"""Every error that Plumbline raises on purpose, under one base. All of them survive pickling between processes.

``UserError`` is wrong use (the CLI prints its one line and exits with 2); the others are failures at run time (exit 1).
"""


class PlumblineError(Exception):
    """Base of all errors below; its message is one line fit for a user's eyes."""


class UserError(PlumblineError, ValueError):
    """Wrong use: names the file, the row or the key, what was wrong and what would be right."""


class ConfigError(UserError):
    """A config file, key or value that cannot be run."""


class DataError(UserError):
    """A data file or row that cannot be read."""


class ModelError(UserError):
    """A directory or model that is not what it was named to be."""


class RunError(PlumblineError):
    """A failure at run time; what was saved stays usable."""


class DiskError(RunError):
    """A disk is full, or may not be written."""


class LostError(RunError):
    """A process or its node died before it answered; asking another may help."""


class LossError(RunError):
    """The loss or its gradient became NaN or infinite."""


class SyncError(RunError):
    """An engine does not answer as the version it was told to load (DESIGN.md, Weights).

    Attributes:
        policy, version: what should have been loaded.
        engine: the engine that failed the proof.
        difference: largest absolute difference of probe log-probs, in nats.
    """

    def __init__(self, policy: str, version: int, engine: str, difference: float, reason: str) -> None:
        super().__init__(policy, version, engine, difference, reason)  # the args are what pickle rebuilds it from
        self.policy = policy
        self.version = version
        self.engine = engine
        self.difference = difference
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.policy} v{self.version:06d} did not arrive at engine {self.engine}: {self.reason} "
            f"(largest log-prob difference {self.difference:.3g})"
        )


def in_one_line(error: BaseException) -> str:
    """An error's type and the last line of its message, which says most where a library raised it."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"
