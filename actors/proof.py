"""The proof that a version arrived at an engine, which `actors.versions` asks for before a request gets that version.

It is two. The exact one holds digests of the tensors that the engine has against the learner's: a tensor that is
missing, stale or damaged is named. The behavioural one holds the engine's log-probs of a fixed probe against the
learner's: it finds what tensors do not show, such as a wrong slot, a stale copy or a broken kernel. It looks along the
way that the learner went, so that it finds it in bfloat16 too, where a step is smaller than the noise of a token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import fdtri, stdtrit

from plumbline.config.tree import Config
from plumbline.errors import SyncError
from plumbline.records import PolicyRef, Publication

TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 2.5e-1}
"""Nats a token by which a probe response's log-prob may differ between learner and engine. Measured of transformers and
vLLM: 1e-6 in float32, near 1e-2 in bfloat16; the margin covers unlike kernels. The sharper tests scale with what is
seen."""

FALSE_ALARM = 1e-8
"""How rarely noise alone may look like a step that was not taken."""
NO_STEP = 1e-6
"""How rarely noise may look like a step at all, where all of it is the learner's; where half is, below 1e-12."""
NOISE_GROWTH = 6
"""How much larger than at the base the noise of a trained version may be."""
NAMED = 3
"""Tensors that a message names; of more it says how many."""

BASE = PolicyRef()
Digests = Mapping[str, str | None]
"""What an engine's worker holds, by the names of the learner: None where the engine keeps a tensor in another form."""


def tolerance_of(config: Config, dtype: str) -> float:
    """What a run says, or what fits its dtype; a learner in 4 bits is as far from an engine as one in bfloat16."""
    quantized = any(one.learner.quantize for one in config.served)
    return config.fleet.sync_tolerance or TOLERANCE["bfloat16" if quantized else dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a passed proof measured.

    Attributes:
        difference: largest difference of the probe's log-probs between learner and engine, in nats a token.
        drift: the way from version 0 that the engine shows, as a share of the learner's: near 1, or nan where all of
            that way drowns in numerical noise.
        exact: tensors that are the learner's by their digests, on every worker.
    """

    ref: PolicyRef
    engine: str
    difference: float
    drift: float
    exact: int = 0


def prove(
    publication: Publication,
    *,
    engine: str,
    measured: Sequence[float],
    base_measured: Sequence[float],
    tolerance: float,
    beside: Sequence[float] | None = None,
    origin: PolicyRef = BASE,
    expected: Mapping[str, str] | None = None,
    held: Sequence[Digests] = (),
) -> Proof:
    """Both proofs of one version at one engine.

    Args:
        measured: the engine's log-probs [N] of the probe under this version, means over tokens.
        base_measured: the same [N] under version 0. What learner and engine differ by there shows the noise.
        tolerance: nats a token that any one may be off.
        beside: version 0's [N] again, asked together with this version.
        origin: what `base_measured` and the publication's base are of, where that is not version 0.
        expected: the learner's digests by name, in the form of the engine's dtype; without any there is no exact proof.
        held: what each worker of the engine holds of them.

    Raises:
        SyncError: names version, engine, what is wrong, and the largest difference of log-probs.
    """
    base = publication.base_probe_logps
    difference = max((abs(a - b) for a, b in zip(measured, publication.probe_logps, strict=True)), default=math.inf)

    def fail(reason: str) -> SyncError:
        return SyncError(publication.ref.policy, publication.ref.version, engine, difference, reason)

    if not all(map(math.isfinite, [difference, *measured])):  # max() overlooks a nan that does not come first
        raise fail("its probe log-probs are not finite")
    digests = expected or {}
    if wrong := _otherwise(digests, held):
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        names = f"{', '.join(wrong[:NAMED])}{more}"
        raise fail(f"{len(wrong)} of {len(digests)} tensors in it are not the learner's ({names})")
    noise = _rms([a - b for a, b in zip(base_measured, base, strict=True)])
    shown = [a - b for a, b in zip(measured, base_measured, strict=True)]
    way = [a - b for a, b in zip(publication.probe_logps, base, strict=True)]
    off = [a - b for a, b in zip(shown, way, strict=True)]
    if beside is not None:
        moved = [a - b for a, b in zip(beside, base_measured, strict=True)]
        to_version = _share(way, [a - b for a, b in zip(moved, way, strict=True)], max(noise, tolerance / 1000))
        if to_version > 0.5 or not all(abs(m) <= tolerance for m in moved):
            raise fail(f"beside it, the base answers otherwise, by {_rms(moved):.2g} nats a token")
    last = PolicyRef(policy=publication.ref.policy, version=publication.ref.version - 1)
    starts = {origin: base} | ({last: publication.previous_probe_logps} if last.version > 0 else {})
    shares = {}
    for start, before in starts.items():
        step = [a - b for a, b in zip(publication.probe_logps, before, strict=True)]
        shares[start] = share = _share(step, off, max(noise, tolerance / 1000))
        if abs(share) < 0.5:
            raise fail(f"it still answers as {start}")
        if abs(share - 1) > 0.5:
            raise fail(f"it moved {share:.2f} times as far from {start} as the learner did")
    if _rms(off) > max(NOISE_GROWTH * math.sqrt(2) * noise, tolerance / 10):
        raise fail(f"its probe log-probs moved otherwise than the learner's, by {_rms(off):.2g} nats a token")
    if difference > tolerance:
        raise fail(f"its probe log-probs are not the learner's within {tolerance:g}")
    exact = sum(all(worker[name] for worker in held) for name in digests) if held else 0
    return Proof(ref=publication.ref, engine=engine, difference=difference, drift=shares[origin], exact=exact)


def _otherwise(expected: Mapping[str, str], held: Sequence[Digests]) -> list[str]:
    """Names of tensors that a worker lacks, or has otherwise, or has though the learner has none."""
    names = dict.fromkeys(name for worker in held for name in (*expected, *worker))
    return [n for n in names if any(w.get(n, "") not in (None, expected.get(n)) for w in held)]


def _share(step: Sequence[float], off: Sequence[float], noise: float) -> float:
    """How much of a learner's `step` [N] an engine shows that is `off` [N] the way which the learner went.

    1 where it is off by nothing along the step, 0 where it is off by all of it; nan where that cannot be told from
    noise. The noise of a difference is that of the base twice over, or what is seen across the step, if that is more.
    A step that may be noise of the learner alone tells nothing: an engine that took it shows none of that noise.
    """
    size = len(step)
    length = math.sqrt(sum(a * a for a in step))
    if length == 0:
        return math.nan
    along = sum(a * b for a, b in zip(step, off, strict=True)) / length
    across = math.sqrt(max(0.0, sum(a * a for a in off) - along * along) / max(1, size - 1))
    if length <= math.sqrt(2 * size * float(fdtri(size, size, 1 - NO_STEP))) * max(noise, across):
        return math.nan
    certain = float(stdtrit(max(1, size - 1), 1 - FALSE_ALARM)) * max(math.sqrt(2) * noise, across)
    share = 1 + along / length
    return share if abs(along) > certain or certain < 0.5 * length else math.nan


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values)) if values else 0.0
