"""The house: who may import whom, that no files go in a circle, and what may stand where."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOUSE = """
    plumbline.errors  plumbline.records
    plumbline.importing  plumbline.submitted
    plumbline.config
    plumbline.models
    plumbline.data
    plumbline.methods
    plumbline.runs
    plumbline.report
    plumbline.tracking
    plumbline.miniature
    plumbline.placement
    plumbline.doctor  plumbline.proposal  plumbline.tuning
    actors
    pipelines  serve
    cli
"""
"""A wing imports its own files and what comes before it in this list. Two on one line do not know each other."""

MEND = "; move what both need into an earlier wing, or hand it over as an argument (docs/architecture.md, The house)"

ROOMS = ("plumbline", "actors", "pipelines", "serve", "cli")
HEAVY = {"ray", "vllm", "deepspeed"}
PROCESSES = {"generator", "scorer", "reference", "embedder", "channel", "weights", "desk"}
SHARED = {"channel", "weights"}
MAY_PRINT = {
    "cli/guard.py",
    "cli/main.py",
    "cli/preparing.py",
    "cli/serving.py",
    "cli/tuning.py",
    "plumbline/miniature/__main__.py",
}

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LEVELS = {wing: level for level, line in enumerate(HOUSE.split("\n")) for wing in line.split()}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """`plumbline.config.tree`, and `plumbline.config` for its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


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


def wing_of(module: str) -> str | None:
    """The wing that a dotted name lies in; None where it is not of the house."""
    return next((wing for wing in LEVELS if f"{module}.".startswith(f"{wing}.")), None)


def neighbours(path: Path) -> set[str]:
    """Files of the house that a file imports."""
    return {name for name in imports(path) if name in MODULES} - {module_of(path)}


def test_every_file_stands_in_a_wing() -> None:
    assert [name_of(p) for p in FILES if wing_of(module_of(p)) is None] == ["plumbline/__init__.py"]
    assert not [wing for wing in LEVELS if not any(wing_of(module) == wing for module in MODULES)]
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_wing_imports_only_what_comes_before_it(path: Path) -> None:
    own = wing_of(module_of(path))
    for name in imports(path):
        wing = wing_of(name)
        assert not name.startswith(("tests", "benchmarks")), f"{name_of(path)} imports {name}"
        if wing is not None and wing != own:
            assert LEVELS[wing] < LEVELS[own or wing], f"{name_of(path)} imports {name}, later in HOUSE{MEND}"


def test_no_files_go_in_a_circle() -> None:
    try:
        TopologicalSorter({module: neighbours(path) for module, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}{MEND}")


def test_a_name_has_one_place() -> None:
    """A folder's `__init__.py` says what is in it, and hands none of it on."""
    assert not [name_of(path) for path in FILES if path.name == "__init__.py" and neighbours(path)]


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith("plumbline/")], ids=name_of)
def test_plumbline_is_pure(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(path)} & HEAVY
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    loads = [n for n in calls if ast.unparse(n.func).endswith("import_module")]
    by_name = {arg.value for n in loads for arg in n.args if isinstance(arg, ast.Constant)}
    assert not {str(name).partition(".")[0] for name in by_name} & HEAVY


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


@pytest.mark.parametrize("path", sorted((ROOT / "tests/unit").rglob("test_*.py")), ids=name_of)
def test_unit_tests_stand_as_the_wings_do(path: Path) -> None:
    """tests/unit/config/ tries plumbline/config/, tests/unit/actors/learning/ actors/learning/; what is of the whole
    repository stands at the top."""
    folder = path.parent.relative_to(ROOT / "tests/unit").as_posix()
    if folder == ".":
        assert path.stem in {
            *("test_architecture", "test_deploy", "test_docs", "test_examples", "test_importing", "test_proposal"),
            "test_submitted",
        }
    else:
        assert folder.partition("/")[0] in {wing.rpartition(".")[2] for wing in LEVELS}
        assert (ROOT / folder).is_dir() or (ROOT / "plumbline" / folder).is_dir()


def test_no_file_names_a_place_of_this_machine() -> None:
    """A path that exists on one machine alone works on one machine alone."""
    parts = ROOT.parts[1:]
    shipped = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    shipped += [*(ROOT / "examples").rglob("*.py"), *(ROOT / "examples").rglob("*.yaml")]
    if len(parts) < 2:
        pytest.skip("the checkout lies too near the root for its path to be told from any other")
    assert not [name_of(path) for path in shipped if str(ROOT) in path.read_text("utf-8")]
