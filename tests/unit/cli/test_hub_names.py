"""A run whose base is named as on the hub, command by command: all of them have the commit that it began with."""

import json
import shutil
from pathlib import Path

import yaml

from plumbline.records import PolicyRef, Publication
from plumbline.runs.policies import version_directory, write_probe, write_proof
from tests.hub import fill_cache, python, serve_hub
from tests.tiny import make_prompts, make_tiny_adapter, make_tiny_model, tiny_config, write_config
from tests.unit.runs.test_export import PROBE, means

COMMANDS = """
import json, sys
from types import SimpleNamespace
from cli.main import main
from plumbline.runs.directory import open_run_dir

def run(run_dir, listen, checked, endpoint):  # in place of what would start Ray
    with open_run_dir(checked.config, run_dir):
        print("base:", checked.placed.plan.config.model.path)
    return {}

sys.modules["pipelines.run"] = SimpleNamespace(run=run)
for command in json.loads(sys.argv[1]):
    print("code:", main(command))
"""
OTHERS = """
import sys
from pathlib import Path
import pipelines.run
from cli.main import main
from serve.target import read_target

async def within_ray(config, work):
    print("base:", config.model.path)
    print("named:", work.args[-1])
    return {"table": "", "samples": []}

pipelines.run.within_ray = within_ray
print("engine:", read_target(Path(sys.argv[1]), {}).served.replica.engine.model_path)
print("code:", main(["evaluate", sys.argv[1], "--of", "base", "org/other"]))
"""


def test_all_commands_have_the_commit_that_the_run_began_with(tmp_path: Path, tiny_model: Path) -> None:
    config = tiny_config(tmp_path)
    config["model"]["path"] = "org/model"
    config["fleet"] = {"engine": "transformers"}
    config["data"]["heldout"] = {"path": str(make_prompts(tmp_path / "heldout.jsonl", 4, seed=1))}
    config["evaluation"] = {"prompts": 2}
    path, run_dir, home = write_config(tmp_path, config), tmp_path / "run", tmp_path / "home"
    with serve_hub() as hub:
        commit = hub.add("org/model", tiny_model)
        snapshot = home / "hub" / "models--org--model" / "snapshots" / commit

        def commands(*asked: list[str], **variables: str) -> str:
            given = json.dumps([[str(word) for word in command] for command in asked])
            return python(COMMANDS, given, home=home, url=hub.url, cwd=tmp_path, **variables)

        begin, doctor = (
            ["run", str(path), "--run-dir", str(run_dir)],
            ["doctor", str(path), "--run-dir", str(run_dir)],
        )
        offline = commands(begin, HF_HUB_OFFLINE="1")
        assert "plumbline: model.path: org/model: no such directory, not whole in the cache" in offline
        offline = commands(doctor, HF_HUB_OFFLINE="1")
        assert "FAIL hub: model.path: org/model: no such directory, not whole in the cache" in offline
        assert "code: 2" in offline and "ok   hub" not in offline
        assert not run_dir.exists()

        told = commands(begin, doctor)
        assert f"base: {snapshot}\n" in told and told.count("code: 0") == 2
        assert f"ok   hub: org/model at {commit}\n" in told
        kept = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert (kept["model"]["path"], kept["commits"]) == ("org/model", {"org/model": commit})

        # The branch moves, another machine's cache is empty, and a folder there has the model's name.
        new = hub.add("org/model", make_tiny_model(tmp_path / "moved", seed=7))
        shutil.rmtree(home)
        (tmp_path / "org" / "model").mkdir(parents=True)
        told = commands(["resume", str(run_dir)])
        assert f"base: {snapshot}\n" in told
        (tmp_path / "org" / "model").rmdir()
        shutil.rmtree(home)
        fill_cache(home, "org/model", tmp_path / "moved", new)
        told = commands(begin, ["doctor", str(path), "--run-dir", str(tmp_path / "other")])
        assert f"base: {snapshot}\n" in told and f"hub: org/model at {new}" in told

        ref = PolicyRef(policy="ple", version=1)
        version = make_tiny_adapter(version_directory(run_dir, ref), tiny_model)
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        before = means(base)
        after = means(PeftModel.from_pretrained(base, str(version)))
        write_probe(run_dir, PROBE)
        proof = Publication(ref=ref, files={}, probe_logps=after, previous_probe_logps=before, base_probe_logps=before)
        write_proof(version, proof)
        hub.tokens["hf_writes"] = True
        told = commands(
            ["export", str(run_dir), "ple", "whole", "--push", "me/whole"],
            ["export", str(run_dir), "ple@1", "adapter", "--adapter", "--push", "me/adapter"],
            ["report", str(run_dir)],
            ["export", str(run_dir), "ple", "rows", "--pairs", "--push", "me/whole"],
            HF_TOKEN="hf_writes",
        )
        assert told.count("code: 0") == 3 and "nats a token of the version" in told
        assert f"pushed to {hub.url}/me/whole (private)" in told
        for name, out in (("me/whole", "whole"), ("me/adapter", "adapter")):
            pushed = hub.repos[name].commits[hub.repos[name].refs["main"]]
            assert pushed["README.md"] == (tmp_path / out / "README.md").read_bytes()
            card = pushed["README.md"].decode()
            assert (
                card.startswith("---\nbase_model: org/model\n")
                and f"- `model.path`: `org/model` at commit `{commit}`" in card
            )
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/model", commit)
        assert f"org/model<small>commit {commit}</small>" in (run_dir / "report.html").read_text()
        assert "plumbline: --push: pushes models, and --pairs writes rows" in told

        other = hub.add("org/other", make_tiny_model(tmp_path / "second", seed=8))
        told = python(OTHERS, run_dir, home=home, url=hub.url, cwd=tmp_path)
        assert f"engine: {snapshot}\n" in told and f"base: {snapshot}\n" in told and "code: 0" in told
        assert f"models--org--other/snapshots/{other}" in told
