"""The frozen π0 in a process of its own, for runs whose learners do not hold it whole (`fleet.reference.replicas`).

Pipelines pass a generator's answers on unread; the reference reads them where they are.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from actors.frozen_logps import ContrastLogps, ContrastPrompts, FrozenLogps
from plumbline.models.logp_cache import model_fingerprint
from plumbline.records import Generation, TokenGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSpec:
    """All that a reference needs to start; picklable. `cache` is a directory; without one it remembers by itself.

    `quantize`: as the learner's base is, so that a policy which was not updated yet has the reference's log-probs.
    """

    model_path: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    threads: int
    batch_tokens: int
    cache: str | None
    quantize: Literal["nf4"] | None = None


class Reference:
    """One frozen causal language model, loaded when it is first asked: it may be started before its model is made.

    Methods raise ModelError where the directory holds none.
    """

    def __init__(self, spec: ReferenceSpec) -> None:
        from plumbline.models.backend import set_up_torch

        set_up_torch(spec.threads)
        self._spec = spec

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self._spec.model_path, self._spec.quantize)

    @cached_property
    def _frozen(self) -> FrozenLogps:
        from actors.learning.policy import load_model
        from plumbline.config.data import Model
        from plumbline.models.group_logps import disable_dropout

        spec, fingerprint = self._spec, self._fingerprint  # of the files that are loaded now
        on = spec.device if spec.quantize else None
        model: Any = load_model(Model(path=spec.model_path), spec.dtype, quantize_on=on)
        model.to(spec.device).eval().requires_grad_(False)
        disable_dropout(model)
        return FrozenLogps(
            model,
            batch_tokens=spec.batch_tokens,
            fingerprint=fingerprint,
            dtype=spec.dtype,
            cache=spec.cache,
        )

    def warm(self) -> None:
        """Import what loading needs."""
        importlib.import_module("actors.learning.policy")
        importlib.import_module("transformers.models.auto.modeling_auto")

    def ready(self) -> int:
        """The process id, once the model is loaded."""
        assert self._frozen is not None
        return os.getpid()

    def fingerprint(self) -> str:
        """`model_fingerprint` of the model's directory, as it was when the model was loaded."""
        return self._fingerprint

    def counts(self) -> dict[str, int]:
        """See `FrozenLogps.counts`."""
        return self._frozen.counts()

    def logps(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """See `FrozenLogps.logps`."""
        return self._frozen.logps(groups)

    def contrast_logps(
        self, prompts: Sequence[ContrastPrompts], generations: Sequence[Generation], *, eos: bool
    ) -> list[ContrastLogps]:
        """See `FrozenLogps.contrast_logps`."""
        return self._frozen.contrast_logps(prompts, generations, eos=eos)
