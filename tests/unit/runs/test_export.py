"""What is taken away from a run, and whether others read it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from cli.main import main
from plumbline.errors import DataError, ModelError, UserError
from plumbline.records import PolicyRef, Publication, TokenGroup
from plumbline.runs.export import export_model, export_pairs
from plumbline.runs.pairs import PAIR_SCHEMA
from plumbline.runs.parts import Parts
from plumbline.runs.policies import version_directory, write_probe, write_proof
from tests.tiny import make_tiny_adapter, tiny_config, write_config

PROBE = [TokenGroup([5, 6, 7], [[8, 9, 10]]), TokenGroup([3, 4], [[11, 12]])]
EVALUATION = {
    "rows": [
        {"policy": "before", "reward": {"mean": 0.1, "low": 0.0, "high": 0.2, "n": 8}, "PPL": 3.5},
        {"policy": "ple", "reward": {"mean": 0.8, "low": 0.7, "high": 0.9, "n": 8}, "PPL": 3.0},
        {"policy": "dlma", "reward": {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 8}, "PPL": 3.1},
    ]
}


def means(model: Any) -> list[float]:
    """By transformers alone: mean log-probs of the probe's responses."""
    found = []
    for group in PROBE:
        ids = [*group.prompt_ids, *group.response_ids[0]]
        with torch.no_grad():
            logps = model.eval()(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        at = range(len(group.prompt_ids), len(ids))
        found.append(sum(float(logps[i - 1, ids[i]]) for i in at) / len(at))
    return found


@pytest.fixture
def run_dir(tmp_path: Path, tiny_model: Path) -> Path:
    """A run with one version of an adapter, proved."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = tiny_config(tmp_path)
    config["model"]["path"] = str(tiny_model)
    write_config(run_dir, config).rename(run_dir / "config.yaml")
    ref = PolicyRef(policy="ple", version=1)
    version = make_tiny_adapter(version_directory(run_dir, ref), tiny_model)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = means(base)
    after = means(PeftModel.from_pretrained(base, str(version)))
    write_probe(run_dir, PROBE)
    proof = Publication(ref=ref, files={}, probe_logps=after, previous_probe_logps=before, base_probe_logps=before)
    write_proof(version, proof)
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION))
    return run_dir


def test_a_version_becomes_a_model_that_transformers_loads(run_dir: Path, tmp_path: Path) -> None:
    said = export_model(run_dir, "ple", tmp_path / "out")
    assert "of the version" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    proof = json.loads((version_directory(run_dir, PolicyRef(policy="ple", version=1)) / "proof.json").read_text())
    assert means(model) == pytest.approx(proof["probe_logps"], abs=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    answer = pipeline("text-generation", str(tmp_path / "out"), max_new_tokens=3)([{"role": "user", "content": "Why?"}])
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card, "the hub refuses a card that names a directory"
    assert "# ple@1 of " in card and "type: ple" in card
    assert "| ple | 0.8 [0.7, 0.9] | 3 |" in card and "dlma" not in card
    assert not {"proof.json", "adapter_config.json"} & {file.name for file in (tmp_path / "out").iterdir()}


def test_the_adapter_alone_names_its_base(run_dir: Path, tmp_path: Path, tiny_model: Path) -> None:
    export_model(run_dir, "ple@1", tmp_path / "out", adapter=True)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "out"))
    assert means(merged) != pytest.approx(means(AutoModelForCausalLM.from_pretrained(tiny_model)), abs=0.1)


def test_an_adapter_is_for_what_it_was_trained_on(run_dir: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Not for the model that the run's own base was made of."""
    make_tiny_adapter(tmp_path / "first", tiny_model)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"]["adapter"] = str(tmp_path / "first")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(tiny_model, run_dir / "base")
    (run_dir / "base" / "sources.json").write_text("{}")
    export_model(run_dir, "ple", tmp_path / "out", adapter=True)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run_dir / "base")
    export_model(run_dir, "base", tmp_path / "whole")
    assert not (tmp_path / "whole" / "sources.json").exists() and (tmp_path / "whole" / "config.json").exists()


def test_what_does_not_answer_as_the_version_did_is_not_written(run_dir: Path, tmp_path: Path) -> None:
    proof = version_directory(run_dir, PolicyRef(policy="ple", version=1)) / "proof.json"
    told = json.loads(proof.read_text())
    proof.write_text(json.dumps(told | {"probe_logps": [x - 1.0 for x in told["probe_logps"]]}))
    with pytest.raises(ModelError, match="is that the base that it was trained on"):
        export_model(run_dir, "ple", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_wrong_names_and_places(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no version 'ple@7'"):
        export_model(run_dir, "ple@7", tmp_path / "out")
    with pytest.raises(UserError, match="base: is a whole model, no adapter"):
        export_model(run_dir, "base", tmp_path / "out", adapter=True)
    with pytest.raises(DataError, match="no pairs of 'dlma'; there are those of: none"):
        export_pairs(run_dir, "dlma", tmp_path / "out.jsonl")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export_model(run_dir, "ple", tmp_path / "out")


def test_pairs_are_trls(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    parts = Parts(str(run_dir / "pairs" / "self_contrast"), PAIR_SCHEMA)
    for step, prompt in ((1, "Why? [{"), (2, json.dumps(turns))):
        parts.write(step, [{"step": step, "prompt": prompt, "chosen": "Because.", "rejected": "No ü."}])
    out = tmp_path / "pairs.jsonl"
    assert main(["export", str(run_dir), "self-contrast", str(out), "--pairs"]) == 0
    assert capsys.readouterr().out == f"{out}: 2 pairs\n"
    first, second = map(json.loads, out.read_text("utf-8").splitlines())
    assert first == {
        "prompt": [{"role": "user", "content": "Why? [{"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No ü."}],
    }
    assert second["prompt"] == turns
    shutil.rmtree(run_dir / "pairs")
    assert main(["export", str(run_dir), "dlma", str(tmp_path / "more.jsonl"), "--pairs"]) == 2
