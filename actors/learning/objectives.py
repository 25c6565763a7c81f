"""What a learner minimises: which samples make an optimiser step, and the loss of a micro-batch of them.

An objective turns a part into update batches and a micro-batch into ``(loss, metrics)``, both means over samples, so
that neither the number of workers nor the micro-batch changes the result. Its loss is a function of one number a
response (`Scores`), so that a group which is too large for one forward pass is computed in pieces.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plumbline.config.pipelines import Dlma, Pipeline, Ple, Preference, RewardModel
from plumbline.methods.losses import dpo_loss, ple_loss, reward_model_loss, sft_loss
from plumbline.models.classifier import classifier_logits
from plumbline.models.group_logps import group_logps
from plumbline.records import Sample, TokenGroup
from plumbline.runs.parts import Parts
from plumbline.runs.rollouts import ple_sample

Scores = tuple[Float[Tensor, "G K"], Int[Tensor, "G K"]]
"""What a model gives each response of a group, and the response's tokens; 0 and 0 where there is none."""
Result = tuple[Float[Tensor, ""], dict[str, Tensor]]


class Loss(Protocol):
    """What an update is computed of."""

    def forward(self, model: Any, groups: Sequence[TokenGroup]) -> Scores:
        """What the loss is computed from; a response's score does not depend on the other responses."""
        ...

    def loss(self, scores: Scores, samples: Sequence[Sample]) -> Result:
        """Mean loss of a micro-batch and metrics that are means over its samples."""
        ...


class Objective(Loss, Protocol):
    """A method, seen from the learner."""

    def restore(self, done: int) -> None:
        """Called once, before the first part: steps up to `done` are in the weights already."""
        ...

    def updates(self, step: int, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        """The samples of each optimiser step that part `step` asks for."""
        ...

    def figures(self) -> dict[str, float]:
        """Further figures of the present step."""
        ...


class OfLogps:
    """What the objectives share that need each response's log-prob."""

    def forward(self, model: Any, groups: Sequence[TokenGroup]) -> Scores:
        return group_logps(model, groups)


class PleObjective(OfLogps):
    """METHODS.md §3: the data set D of all steps so far (or a window of it), classified anew by the present τ."""

    def __init__(self, section: Ple, parts: Path, seed: int) -> None:
        self._section = section
        self._parts = parts
        self._seed = seed
        self._replay: dict[int, list[Sample]] = {}
        self._tau = section.tau0

    def restore(self, done: int) -> None:
        window = self._section.replay_window or done
        if done:
            parts = Parts(str(self._parts), read_only=True)
            self._replay = {
                s: [ple_sample(row) for row in parts.read(s)] for s in range(max(1, done - window + 1), done + 1)
            }

    def updates(self, step: int, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        self._tau = self._section.tau0 * self._section.alpha ** (step - 1)
        self._replay[step] = list(samples)
        if self._section.replay_window is not None:
            self._replay = {s: kept for s, kept in self._replay.items() if s > step - self._section.replay_window}
        pool = [sample for kept in self._replay.values() for sample in kept]
        random.Random(f"{self._seed}-{step}").shuffle(pool)
        yield from even_chunks(pool, self._section.learner.batch_size)

    def loss(self, scores: Scores, samples: Sequence[Sample]) -> Result:
        logps_GK, tokens_GK = scores
        rewards_GK = torch.tensor([s.rewards for s in samples], dtype=torch.float64, device=logps_GK.device)
        return ple_loss(
            *logps_GK.unbind(1),
            *tokens_GK.unbind(1),
            *rewards_GK.unbind(1),
            threshold=self._tau,
            length_normalize_sft=self._section.length_normalize_sft,
            hinge=self._section.hinge,
            rank_weight=self._section.rank_weight,
            sft_weight=self._section.sft_weight,
        )

    def figures(self) -> dict[str, float]:
        return {"tau": self._tau, "replayed": sum(map(len, self._replay.values()))}


class SftObjective(OfLogps):
    """Cross-entropy of the targets: `sft`, and of the best answers: `raft`."""

    def restore(self, done: int) -> None:
        pass

    def updates(self, step: int, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        if samples:  # every prompt of a part may have been rejected
            yield list(samples)

    def loss(self, scores: Scores, samples: Sequence[Sample]) -> Result:
        logps_GK, tokens_GK = scores
        return sft_loss(logps_GK[:, 0], tokens_GK[:, 0])

    def figures(self) -> dict[str, float]:
        return {}


class DpoObjective(OfLogps):
    """METHODS.md §1, §2: DPO with all of a prompt's negatives in one group, with DLMA's margins where there are any."""

    def __init__(self, section: Preference) -> None:
        self._section = section

    def restore(self, done: int) -> None:
        pass

    def updates(self, step: int, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        yield from even_chunks(samples, self._section.learner.batch_size)

    def loss(self, scores: Scores, samples: Sequence[Sample]) -> Result:
        logps_GK, tokens_GK = scores
        K = logps_GK.shape[1]
        reference_GK = _table([s.ref_logps for s in samples], K, logps_GK.device)
        margins: dict[str, Any] = {}
        if isinstance(self._section, Dlma):
            margins["margins"] = _table([s.margins for s in samples], K - 1, logps_GK.device)
            margins["margin_weight"] = self._section.margin_weight
            margins["margin_clamp"] = self._section.margin_clamp
        return dpo_loss(
            logps_GK[:, 0],
            logps_GK[:, 1:],
            reference_GK[:, 0],
            reference_GK[:, 1:],
            beta=self._section.beta,
            rejected_mask=tokens_GK[:, 1:] > 0,
            **margins,
        )

    def figures(self) -> dict[str, float]:
        return {}


class RewardObjective(SftObjective):
    """A sequence classifier's one logit: binary cross-entropy of labels, or Bradley-Terry of (chosen, rejected)."""

    def __init__(self, section: RewardModel) -> None:
        self._section = section

    def forward(self, model: Any, groups: Sequence[TokenGroup]) -> Scores:
        """The one logit of each text; all groups have equally many."""
        texts = [ids for group in groups for ids in group.response_ids]
        logits = classifier_logits(model, texts, [one for group in groups for one in group.beside])[:, 0]
        return logits.view(len(groups), -1), torch.tensor([len(ids) for ids in texts]).view(len(groups), -1)

    def loss(self, scores: Scores, samples: Sequence[Sample]) -> Result:
        scores_GK, _ = scores
        if self._section.source == "pairs":
            return reward_model_loss(*scores_GK.unbind(1))
        scores_G = scores_GK[:, 0]
        labels_G = torch.tensor([s.rewards[0] for s in samples], device=scores_G.device)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores_G, labels_G)
        return loss, {"accuracy": ((scores_G > 0) == (labels_G > 0.5)).float().mean()}


def build_objective(section: Pipeline, parts: Path, seed: int) -> Objective:
    """The objective that a pipeline's section of the config asks for."""
    if isinstance(section, Ple):
        return PleObjective(section, parts, seed)
    if isinstance(section, Preference):
        return DpoObjective(section)
    return RewardObjective(section) if isinstance(section, RewardModel) else SftObjective()


def _table(rows: Sequence[Sequence[float]], width: int, device: torch.device) -> Float[Tensor, "G width"]:
    """Rows of unlike lengths, 0 where one has ended; fp64, for log-probs are large and their differences small."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64, device=device)


def even_chunks(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """The fewest chunks of at most `size`, as even as can be: a mean over a tiny remainder would be mostly noise."""
    count = -(-len(samples) // size)
    for i in range(count):
        yield list(samples[i * len(samples) // count : (i + 1) * len(samples) // count])
