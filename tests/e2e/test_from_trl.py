"""The commands of docs/from_trl.md, one after another: from TRL's rows to a model that transformers answers by."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from plumbline.miniature.language import TARGET, sample_answer, sample_request
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and TRL's conversational preferences with the prompt inside of both answers."""
    directory = tmp_path_factory.mktemp("from_trl")
    make_tiny_model(directory / "model")
    draw = Random(0)
    with (directory / "pairs.jsonl").open("w") as file:
        for _ in range(64):
            request = sample_request(draw, harmful=False)
            asked = {"role": "user", "content": request.render()}
            answers = {"chosen": sample_answer(request, TARGET, draw), "rejected": "Never."}
            row = {key: [asked, {"role": "assistant", "content": text}] for key, text in answers.items()}
            file.write(json.dumps(row) + "\n")
    return directory


def test_the_pages_commands_lead_to_a_model_that_answers(folder: Path) -> None:
    page = (ROOT / "docs" / "from_trl.md").read_text("utf-8")
    commands = re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0].splitlines()
    assert len(commands) == 6
    told = []
    for command in commands:
        arguments = shlex.split(command)
        arguments[0] = str(Path(sys.executable).parent / Path(arguments[0]).name)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=400, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        told.append(done.stdout)
    assert told[0].startswith("rows: 64\n") and "with preference: 64" in told[0]
    assert "next: plumbline run my_run/config.yaml" in told[1]
    assert "| dpo " in told[2] and "everything is in" in told[2]
    assert (folder / "runs/my_run/report.html").is_file()
    assert (folder / "my_model/model.safetensors").is_file()
    assert "'role': 'assistant', 'content': '" in told[5]
