"""What users take away from a run: a version as a model that any tool loads, or a pipeline's pairs in TRL's form.

`plumbline export` calls it. Models are what transformers writes: safetensors, tokenizer with its chat template,
generation config, and a model card with the run's figures; before one is there it has to answer as the version did.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from plumbline.config.file import load_config
from plumbline.config.hub import HubModel, hub_models
from plumbline.config.tree import Config
from plumbline.data.tokenizer import run_tokenizer
from plumbline.errors import DataError, ModelError, UserError
from plumbline.models.files import ADAPTER_CONFIG
from plumbline.records import PolicyRef, TokenGroup
from plumbline.runs.checkpoint import write_directory
from plumbline.runs.disk import writing
from plumbline.runs.hub import fetched, pinned
from plumbline.runs.parts import Parts
from plumbline.runs.policies import (
    PROOF,
    SOURCES,
    base_directory,
    check_files,
    parse_ref,
    read_probe,
    read_publication,
    version_directory,
)

_ROUNDING = 2e-2
"""Nats a token by which a mean log-prob may differ for the rounding of weights in half precision alone."""
_FIGURES = ("reward", "guided", "gap", "PPL", "BLEU", "base PPL", "distinct-2", "tokens", "win rate")


def export_model(run_dir: Path, name: str, out: Path, *, adapter: bool = False) -> str:
    """Write a version to the directory `out`, which must not be there; returns what was seen of it.

    Args:
        name: `ple`, whose newest version is taken, `ple@12`, or `base`.
        adapter: a LoRA version as the adapter that it is, for who has the base.

    Raises:
        UserError: `out` is there, or the version has no adapter.
        ModelError: there is no such version, its files are not whole, or what was merged does not answer as it did.
        DiskError: there is no room.
    """
    kept = pinned(load_config(run_dir / "config.yaml"), run_dir)
    ref = parse_ref(run_dir, name)
    if out.exists():
        raise UserError(f"{out}: is there already; name a directory that is not")
    config = fetched(kept)
    base, source = Path(base_directory(config, run_dir)), version_directory(run_dir, ref)
    if ref.version:
        check_files(run_dir, ref)
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if adapter and not is_adapter:
        raise UserError(f"{ref.public}: is a whole model, no adapter; leave --adapter out")

    origin, commit = str(base), None  # of a run with `sft` or `model.adapter`, what that made
    if (named := _named_base(kept)) and origin == config.model.path:
        origin, commit = named.name, kept.commits[named.label]
    seen = ""

    def write(aside: Path) -> None:
        nonlocal seen
        if adapter:
            _copy(source, aside)
            _name_base(aside, origin, commit)
        elif is_adapter:
            from plumbline.models.merging import merge_adapter

            merge_adapter(str(source), str(base), aside)
        else:
            _copy(source if ref.version else base, aside)
        run_tokenizer(config).save_pretrained(aside)
        (aside / "README.md").write_text(_card(kept, run_dir, ref, origin, adapter), encoding="utf-8")
        seen = "as it was published" if adapter or not is_adapter else _check(run_dir, ref, base, aside)

    write_directory(out.absolute(), write)
    return seen


def export_pairs(run_dir: Path, pipeline: str, out: Path) -> int:
    """Write a pipeline's pairs as JSONL in TRL's conversational form; returns how many they are.

    `prompt`, `chosen` and `rejected` are lists of messages, so that a trainer puts its own chat template around them.

    Raises:
        UserError: `out` is there.
        DataError: the run has no pairs of such a pipeline, or a part is damaged.
    """
    name = pipeline.replace("-", "_")
    if not (run_dir / "pairs" / name).is_dir():
        there = ", ".join(sorted(one.name for one in (run_dir / "pairs").glob("*"))) or "none"
        raise DataError(f"{run_dir}: no pairs of {pipeline!r}; there are those of: {there}")
    if out.exists():
        raise UserError(f"{out}: is there already; name a file that is not")
    parts, count = Parts(str(run_dir / "pairs" / name), read_only=True), 0
    aside = out.with_name(f".{out.name}.tmp")
    with writing(out):
        try:
            with aside.open("w", encoding="utf-8") as file:
                for step in parts.steps():
                    for row in parts.read_table(step).select(["prompt", "chosen", "rejected"]).to_pylist():
                        file.write(json.dumps(_conversational(row), ensure_ascii=False) + "\n")
                        count += 1
            aside.replace(out)
        finally:
            aside.unlink(missing_ok=True)
    return count


def _conversational(row: dict[str, str]) -> dict[str, Any]:
    turns = _turns(row["prompt"])
    answers = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    return {"prompt": turns, **answers}


def _turns(prompt: str) -> list[dict[str, str]]:
    """See `plumbline.runs.rollouts.prompt_text`, which wrote it."""
    try:
        turns = json.loads(prompt) if prompt.startswith("[{") else None
    except ValueError:
        turns = None
    if isinstance(turns, list) and all(isinstance(t, dict) and set(t) == {"role", "content"} for t in turns):
        return turns
    return [{"role": "user", "content": prompt}]


def _copy(source: Path, aside: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in (PROOF, SOURCES):
            shutil.copyfile(file, aside / file.name)


def _named_base(config: Config) -> HubModel | None:
    """The run's base, where it has that by name."""
    return next((one for one in hub_models(config) if one.key == "model.path"), None)


def _name_base(aside: Path, base: str, commit: str | None) -> None:
    """An adapter says what it is for, and by that PEFT finds it."""
    path = aside / ADAPTER_CONFIG
    settings = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": base, "revision": commit}
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _check(run_dir: Path, ref: PolicyRef, base: Path, merged: Path) -> str:
    """Hold a merged model's log-probs of the probe against the learner's own of that version, in float32.

    Raises:
        ModelError: it is as far from them as from the base's.
    """
    proof, groups = read_publication(run_dir, ref), read_probe(run_dir)
    found = _means(merged, groups)
    far = max(map(_distance, found, proof.probe_logps))
    moved = max(map(_distance, proof.base_probe_logps, proof.probe_logps))
    if not far <= max(_ROUNDING, moved / 2):
        raise ModelError(
            f"{ref.public}: merged into {base} it is {far:.2g} nats a token from what it was in training, and the base "
            f"{moved:.2g}: is that the base that it was trained on?"
        )
    return f"on the probe within {far:.1g} nats a token of the version, which is {moved:.2g} from the base"


def _distance(one: float, other: float) -> float:
    return abs(one - other)


def _means(model_path: Path, groups: Sequence[TokenGroup]) -> list[float]:
    """Log-probs of the probe's responses under a model, in nats a token, computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from plumbline.models.group_logps import disable_dropout, group_logps
    from plumbline.models.loading import load_whole

    model = load_whole(AutoModelForCausalLM, str(model_path), "float32").eval()
    disable_dropout(model)
    means: list[float] = []
    with torch.inference_mode():
        for group in groups:
            sums, tokens = group_logps(model, [group])
            means += (sums / tokens.clamp(min=1))[0].tolist()
    return means


def _card(config: Config, run_dir: Path, ref: PolicyRef, base: str, adapter: bool) -> str:
    """A model card: what it was made of, by which settings, and the run's figures of its policy."""
    head = {"library_name": "peft" if adapter else "transformers", "tags": ["plumbline"]}
    if named := _named_base(config):  # the hub refuses a card that names any other
        head = {"base_model": named.name, **head}
    sections = [*config.pipelines, *([config.sft] if config.sft else [])]
    settings = [one.model_dump(mode="json", exclude_defaults=True) for one in sections if one.name == ref.policy]
    text = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {ref.public} of {config.name}\n",
        f"Made of `{base}` with Plumbline {importlib.metadata.version('plumbline')}, without preference labels.\n",
    ]
    if models := hub_models(config):
        text += [f"- `{one.key}`: `{one.label}` at commit `{config.commits[one.label]}`" for one in models]
        text.append("")
    if settings:
        text.append(f"```yaml\n{yaml.safe_dump(settings[0], sort_keys=False, allow_unicode=True)}```\n")
    text.append(_figures(run_dir, ref))
    return "\n".join(text)


def _figures(run_dir: Path, ref: PolicyRef) -> str:
    """The run's evaluation as a table, of the base and of this policy, whose newest version it is of."""
    path = run_dir / "evaluation.json"
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
        told = [row for row in rows if row["policy"] in ("before", ref.policy, ref.public, str(ref))]
        names = [name for name in _FIGURES if any(name in row for row in told)]
        lines = [[row["policy"], *(_number(row.get(name)) for name in names)] for row in told]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no evaluation; `plumbline evaluate {run_dir}` writes it anew") from None
    if not lines:
        return "This run was not evaluated.\n"
    table = [["on held-out prompts, 95 %", *names], ["---"] * (len(names) + 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
    return "" if value is None else f"{value:.4g}"
