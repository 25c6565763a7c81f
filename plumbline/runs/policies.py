"""Published versions in a run directory: ``policies/ple/v000012/``, each beside the log-probs that prove it.

The learner writes them; evaluation, serving and resume find and read them. The directories are what PEFT or
transformers write, so that other tools load them as they are.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plumbline.config.tree import Config
from plumbline.errors import ModelError
from plumbline.models.files import ADAPTER_CONFIG
from plumbline.records import PolicyRef, Publication, TokenGroup
from plumbline.runs.disk import write_text

PROBE = "probe.json"
PROOF = "proof.json"
"""What proves a version: the file that is written last."""
MERGED = "base"
"""The directory of a run's model with `model.adapter` merged into it."""
SOURCES = "sources.json"
"""What that was made of, by digests: the file in it that is written last."""
_NAME = re.compile(r"v(\d{6,})")


def version_directory(run_dir: Path, ref: PolicyRef) -> Path:
    """Where a version lies, or would."""
    return run_dir / "policies" / ref.policy / f"v{ref.version:06d}"


def versions(run_dir: Path, policy: str) -> list[int]:
    """Published versions of a policy, ascending."""
    directory = run_dir / "policies" / policy
    if not directory.is_dir():
        return []
    return sorted(int(m[1]) for child in directory.iterdir() if (m := _NAME.fullmatch(child.name)))


def proved_versions(run_dir: Path, policy: str) -> list[int]:
    """Those of them that lie there with what proves them, which is written last."""
    root = run_dir / "policies" / policy
    return [v for v in versions(run_dir, policy) if (root / f"v{v:06d}" / PROOF).is_file()]


def base_directory(config: Config, run_dir: Path) -> str:
    """Where a run's π0 lies: the config's model, what its adapter was merged into, or what the `sft` section made.

    Raises:
        ModelError: it is not there.
    """
    if config.sft:
        return str(version_directory(run_dir, parse_ref(run_dir, config.sft.name)))
    if config.model.adapter is not None:
        if not (run_dir / MERGED / SOURCES).is_file():
            raise ModelError(f"{run_dir}: no `{MERGED}` in it, π0 with its adapter; `plumbline resume` makes it")
        return str(run_dir / MERGED)
    assert config.model.path is not None
    return config.model.path


def model_path(path: str) -> str:
    """A model's directory; of a policy's, such as ``runs/a/policies/reward``, the newest version in it."""
    directory = Path(path)
    if (directory / "config.json").exists() or not directory.is_dir():
        return path
    numbers = sorted(int(m[1]) for child in directory.iterdir() if (m := _NAME.fullmatch(child.name)))
    return str(directory / f"v{numbers[-1]:06d}") if numbers else path


def write_proof(directory: Path, publication: Publication) -> None:
    """Keep what a version is proved by beside its weights: log-probs of the probe, digests of its tensors."""
    proof = {
        "probe_logps": list(publication.probe_logps),
        "previous_probe_logps": list(publication.previous_probe_logps),
        "base_probe_logps": list(publication.base_probe_logps),
        "digests": publication.digests,
    }
    (directory / PROOF).write_text(json.dumps(proof), encoding="utf-8")


def write_probe(run_dir: Path, groups: Sequence[TokenGroup]) -> None:
    """Keep what versions are proved on: an endpoint proves them on the same, without the run's data."""
    path = run_dir / PROBE
    write_text(path, json.dumps([[group.prompt_ids, group.response_ids] for group in groups]))


def read_probe(run_dir: Path) -> list[TokenGroup]:
    """Raises ModelError where the run has written none."""
    path = run_dir / PROBE
    if not path.is_file():
        raise ModelError(f"{run_dir}: no {PROBE} in it, which versions are proved on; `plumbline resume` writes it")
    return [TokenGroup(prompt, responses) for prompt, responses in json.loads(path.read_text("utf-8"))]


def read_publication(run_dir: Path, ref: PolicyRef, sent: bool = False) -> Publication:
    """A version and what proves it, as published: with an adapter's files, or the directory of a whole model's.

    Args:
        sent: to where that directory is not: with the files of a whole model too.
    """
    directory = version_directory(run_dir, ref)
    proof: dict[str, Any] = json.loads((directory / PROOF).read_text("utf-8"))
    if not sent and not (directory / ADAPTER_CONFIG).exists():
        return Publication(ref=ref, files={}, directory=str(directory.absolute()), **proof)
    return Publication(ref=ref, files=read_files(directory), **proof)


def version_digest(digests: Mapping[str, Mapping[str, str]], probe_logps: Sequence[float]) -> str:
    """What a version is known by, of its tensors' digests; of its log-probs, where it was published without any."""
    known = json.dumps([digests or {}, [] if digests else list(probe_logps)], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def read_digest(run_dir: Path, ref: PolicyRef) -> str:
    """What the version that lies there is known by. Raises ModelError where its proof cannot be read."""
    path = version_directory(run_dir, ref) / PROOF
    try:
        proof = json.loads(path.read_text("utf-8"))
        return version_digest(proof.get("digests", {}), proof["probe_logps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path}: is no proof of a version; put back what the run wrote") from None


def check_files(run_dir: Path, ref: PolicyRef) -> None:
    """Whether a version's tensors lie there whole, as far as their files say, without reading them.

    Raises:
        ModelError: there are none, or a file is empty, cut off, or none of safetensors.
    """
    directory = version_directory(run_dir, ref)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory}: no weights in it (*.safetensors); put back what the run wrote")
    for path in files:
        if (size := _expected_size(path)) != path.stat().st_size:
            reason = "is no safetensors file" if size is None else f"has {path.stat().st_size} bytes in place of {size}"
            raise ModelError(f"{path}: {reason}; put back what the run wrote")


def _expected_size(path: Path) -> int | None:
    """The bytes that a safetensors file has by its own header; None where it has no header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 2**27)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + length + max(ends)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def read_files(directory: Path) -> dict[str, bytes]:
    """The files of a version, without what proves it."""
    return {f.name: f.read_bytes() for f in sorted(directory.iterdir()) if f.name != PROOF}


def parse_ref(run_dir: Path, name: str) -> PolicyRef:
    """`base`, `ple` (its newest version) or `ple@12`. Raises ModelError naming what there is."""
    if name == "base":
        return PolicyRef()
    policy, _, version = name.partition("@")
    there = versions(run_dir, policy)
    if not there:
        known = sorted(p.name for p in (run_dir / "policies").glob("*") if p.is_dir())
        raise ModelError(f"{run_dir}: no policy {policy!r}; there are base{''.join(', ' + k for k in known)}")
    if version and (not version.isdigit() or int(version) not in there):
        raise ModelError(f"{run_dir}: no version {name!r}; there are {policy}@{there[0]} to {policy}@{there[-1]}")
    return PolicyRef(policy=policy, version=int(version) if version else there[-1])


def servable(run_dir: Path) -> list[str]:
    """Names of the policies whose versions generators can load: those that are kept with their proof."""
    found = sorted(p.name for p in (run_dir / "policies").glob("*") if p.is_dir())
    return [
        name for name in found if (numbers := proved_versions(run_dir, name)) and _probed(run_dir, name, numbers[-1])
    ]


def _probed(run_dir: Path, policy: str, version: int) -> bool:
    """A model that nobody was meant to load, such as a reward, has no probe to be proved on."""
    proof = version_directory(run_dir, PolicyRef(policy=policy, version=version)) / PROOF
    return bool(json.loads(proof.read_text("utf-8"))["probe_logps"])
