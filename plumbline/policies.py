"""Published versions in a run directory: ``policies/ple/v000012/``, each beside the log-probs that prove it.

The learner writes them; evaluation, serving and resume find and read them. The directories are what PEFT or
transformers write, so that other tools load them as they are.
"""

import json
import re
from collections.abc import Container, Sequence
from pathlib import Path

from plumbline.errors import ModelError
from plumbline.records import PolicyRef, Publication

ADAPTER_CONFIG = "adapter_config.json"
_PROOF = "proof.json"
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


def model_path(path: str) -> str:
    """A model's directory; of a policy's, such as ``runs/a/policies/reward``, the newest version in it."""
    directory = Path(path)
    if (directory / "config.json").exists() or not directory.is_dir():
        return path
    numbers = sorted(int(m[1]) for child in directory.iterdir() if (m := _NAME.fullmatch(child.name)))
    return str(directory / f"v{numbers[-1]:06d}") if numbers else path


def write_proof(directory: Path, publication: Publication) -> None:
    """Keep the probe log-probs of a version beside its weights."""
    probes = {
        "probe_logps": list(publication.probe_logps),
        "previous_probe_logps": list(publication.previous_probe_logps),
        "base_probe_logps": list(publication.base_probe_logps),
    }
    (directory / _PROOF).write_text(json.dumps(probes), encoding="utf-8")


def read_publication(run_dir: Path, ref: PolicyRef) -> Publication:
    """A version with its files and probe log-probs, as the learner published it."""
    directory = version_directory(run_dir, ref)
    probes: dict[str, Sequence[float]] = json.loads((directory / _PROOF).read_text("utf-8"))
    files = {f.name: f.read_bytes() for f in sorted(directory.iterdir()) if f.name != _PROOF}
    return Publication(ref=ref, files=files, **probes)  # type: ignore[arg-type]


def is_adapter(files: Container[str]) -> bool:
    """Whether a publication's files are an adapter; else they are a whole model, or none."""
    return ADAPTER_CONFIG in files


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


def policies(run_dir: Path) -> list[str]:
    """Names of the policies that have a version with a proof, which generators can load beside the base."""
    found = sorted(p.name for p in (run_dir / "policies").glob("*") if p.is_dir())
    return [p for p in found if versions(run_dir, p) and _is_adapter(run_dir, p)]


def _is_adapter(run_dir: Path, policy: str) -> bool:
    newest = PolicyRef(policy=policy, version=versions(run_dir, policy)[-1])
    return (version_directory(run_dir, newest) / ADAPTER_CONFIG).exists()
