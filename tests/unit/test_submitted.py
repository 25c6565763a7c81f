"""Which rule of an ignore file left something out of a submitted job's copy of its directory."""

from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from plumbline.submitted import left_out, left_out_module


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    return tmp_path


RULES = [
    ("build/\n", "build/score.py", "'build/'"),
    ("# all of it\n*.egg-info/\nbuild\n", "rewards/build.py", ""),
    ("build\n", "rewards/build/score.py", "'build'"),
    ("*.py\n!rewards/*.py\n", "rewards/score.py", ""),
    ("!rewards/*.py\n*.py\n", "rewards/score.py", "'*.py'"),
    ("/build/\n", "rewards/build/score.py", ""),
    ("data/\n", "data/prompts.jsonl", "'data/'"),
    ("data/\n", "data", "'data/'"),
]


@pytest.mark.parametrize("file", [".gitignore", ".rayignore"])
@pytest.mark.parametrize(("rules", "name", "rule"), RULES)
def test_the_rule_is_named_by_which_ray_leaves_a_path_out(
    job: Path, file: str, rules: str, name: str, rule: str
) -> None:
    (job / file).write_text(rules)
    said = left_out(name)
    assert said == left_out(str(job / name))
    [excludes] = get_excludes_from_ignore_files(job, include_gitignore=True)
    assert bool(said) == bool(rule) == excludes(job / name / ("x" if "." not in name else ""))
    number = [line.strip() for line in rules.splitlines()].index(rule.strip("'")) + 1 if rule else 0
    assert f"; {file}, line {number}, {rule}, left it out of this job" in said or not rule


def test_a_module_is_a_file_or_a_package(job: Path) -> None:
    (job / ".gitignore").write_text("build/\n/dist.py\n")
    assert "'build/'" in left_out_module("build") and "'build/'" in left_out_module("rewards.build.judge")
    assert "'/dist.py'" in left_out_module("dist")
    assert not left_out_module("rewards.dist")


def test_nothing_is_said_where_no_rule_did_it(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not left_out("build/score.py"), "no rules"
    (job / ".gitignore").write_text("build/\n")
    assert not left_out("other/score.py")
    assert not left_out("/elsewhere/build/score.py")
    assert not left_out("../build/score.py")
    assert left_out("build/score.py")
    (job / "build").mkdir()
    (job / "build/score.py").touch()
    assert not left_out("build/score.py"), "it is there"
    (job / "build/score.py").unlink()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert not left_out("build/score.py"), "no job"
