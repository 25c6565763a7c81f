"""The rooms of DESIGN.md: who may import whom, where `ray.remote` and `print` may stand, and how long a file may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("plumbline", "actors", "pipelines", "serve", "cli")
MAY_IMPORT = {
    "plumbline": {"plumbline"},
    "actors": {"plumbline", "actors"},
    "pipelines": {"plumbline", "actors", "pipelines"},
    "serve": {"plumbline", "actors", "serve"},
    "cli": {"plumbline", "actors", "pipelines", "serve", "cli"},
}
HEAVY = {"ray", "vllm", "deepspeed"}
PROCESSES = {"generator", "scorer", "reference", "learner", "channel", "weights"}
SHARED = {"channel", "weights"}
MAY_PRINT = {"cli/main.py", "cli/serving.py", "plumbline/miniature/__main__.py"}

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all imports, those inside functions and those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_rooms_are_all_here() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    rooms = {name.partition(".")[0] for name in imports(path)} & {*ROOMS, "tests", "benchmarks"}
    assert rooms <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith("plumbline/")], ids=name_of)
def test_plumbline_is_pure(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(path)} & HEAVY


def test_the_command_line_imports_heavy_rooms_only_inside_commands() -> None:
    bodies = [ast.parse((ROOT / f"cli/{name}.py").read_text("utf-8")).body for name in ("main", "serving")]
    top = [n for body in bodies for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {
        name.partition(".")[0]
        for node in top
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    } <= {*sys.stdlib_module_names, "plumbline", "cli"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "actors" and p.stem in PROCESSES], ids=name_of)
def test_actors_know_nothing_of_each_other(path: Path) -> None:
    others = {name.split(".")[1] for name in imports(path) if name.startswith("actors.")} & PROCESSES
    assert others <= SHARED - {path.stem}


def test_ray_remote_appears_in_one_file() -> None:
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "ray.remote":
                found.add(name_of(path))
        if "ray.remote" in set(imports(path)):
            found.add(name_of(path))
    assert found == {"actors/spawn.py"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_fits_in_a_head_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)), "a file opens with what it is for"


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) not in MAY_PRINT], ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_no_file_names_a_place_of_this_machine() -> None:
    """A path that exists on one machine alone works on one machine alone."""
    parts = ROOT.parts[1:]
    shipped = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").glob("*.yaml")]
    if len(parts) < 2:
        pytest.skip("the checkout lies too near the root for its path to be told from any other")
    assert not [name_of(path) for path in shipped if str(ROOT) in path.read_text("utf-8")]
