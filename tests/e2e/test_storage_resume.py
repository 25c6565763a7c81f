"""A run whose machine is lost: another one resumes it from the storage, and nothing is done twice."""

import shutil
import signal
from pathlib import Path

import pytest

from plumbline.runs.parts import Parts
from tests.runs import assert_each_prompt_once, finish, leftovers, start, wait_for
from tests.tiny import make_prompts, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_a_run_goes_on_where_its_storage_stands(tmp_path: Path) -> None:
    first, second, store = tmp_path / "first", tmp_path / "second", tmp_path / "store" / "tiny"
    for head in (first, second):
        head.mkdir()
    config = tiny_config(tmp_path) | {"fleet": {"engine": "transformers"}, "storage_path": f"file://{tmp_path}/store"}
    config["data"]["heldout"] = {"path": str(make_prompts(tmp_path / "heldout.jsonl", 8, seed=1))}
    config["evaluation"] = {"prompts": 8}

    process = start(first, config)
    wait_for(first, process, steps=3)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 130, err
    assert leftovers(first) == []
    shutil.rmtree(first)  # with the run directory in it

    kept = {path.name: path.read_bytes() for path in (store / "rollouts" / "ple").glob("step-*.parquet")}
    published = len(list((store / "policies" / "ple").glob("*/proof.json")))
    assert 3 <= published < 8
    process = start(second, config)
    code, _, err = finish(process)
    assert code == 0, err
    rows = assert_each_prompt_once(second)
    new = [row for row in rows if f"step-{row['step']:06d}.parquet" not in kept]
    assert min(row["version"] for row in new) >= published, "versions go on"
    for name, content in kept.items():
        assert (second / "run" / "rollouts" / "ple" / name).read_bytes() == content, "a part was drawn twice"

    assert Parts(str(store / "rollouts" / "ple"), read_only=True).read_all() == rows
    assert {path.name for path in (store / "policies" / "ple").iterdir()} == {f"v{i:06d}" for i in range(1, 9)}
    assert {path.name for path in (store / "checkpoints" / "ple").iterdir()} == {"step-000007", "step-000008"}
    for name in ("events.jsonl", "evaluation.json", "probe.json"):
        assert (store / name).read_bytes() == (second / "run" / name).read_bytes()
    assert not [path for path in store.rglob(".*")], "nothing is left aside"
    assert leftovers(second) == []
