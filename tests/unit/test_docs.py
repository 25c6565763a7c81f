"""What README.md and docs/ name is there: links and anchors, files, commands, names in the code, error messages."""

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import parser
from plumbline.config.file import load_config
from plumbline.config.reference import anchor
from plumbline.config.tree import Config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("plumbline", "actors", "serve", "pipelines", "cli")
FOLDERS = (*ROOMS, "benchmarks", "configs", "deploy", "docs", "locks", "scripts", "tests")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)

Cases = list[tuple[Path, str]]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def code(page: Path) -> list[str]:
    """Its fenced blocks and its code spans, line breaks within a span as spaces."""
    text = page.read_text("utf-8")
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    return [*FENCE.findall(text), *(span.replace("\n", " ") for span in spans)]


def anchors(page: Path) -> set[str]:
    """Anchors of its headings; GitHub numbers those that would be equal."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        name = anchor(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def links() -> Iterator[tuple[Path, str]]:
    """Links of Markdown and of HTML that do not lead out of the repository."""
    for page in PAGES:
        text = re.sub(r"(?<!`)`[^`]+`(?!`)", "", prose(page))  # [number](s) in code are no links
        for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"", text):
            if not re.match(r"[a-z]+:", link := "".join(target)):
                yield page, link


def called(pattern: str) -> Cases:
    """Every (page, match) of a pattern in the code that pages show, each once."""
    return sorted({(page, one) for page in PAGES for text in code(page) for one in re.findall(pattern, text)})


def is_key(name: str) -> bool:
    """Whether `serve.port` and the like are keys of a config rather than names of the room `serve`."""
    section, key, *_ = name.split(".")
    field = Config.model_fields.get(section)
    return field is not None and key in getattr(field.annotation, "model_fields", {})


def name_of(value: object) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


LINKS = sorted(set(links()))
COMMANDS = called(r"(?<![\w./@-])(?:\.venv/bin/)?plumbline ([a-z][a-z-]*)")
CONFIGS = called(r"\bconfigs/[\w.-]+\.yaml")
FILES = called(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
NAMES = [(page, name) for page, name in called(rf"^(?:{'|'.join(ROOMS)})(?:\.\w+)+$") if not is_key(name)]


def test_the_pages_say_something_of_each_kind() -> None:
    """Or a pattern above may have stopped matching."""
    assert {page.name for page in PAGES} >= {"README.md", "architecture.md", "configuration.md", "methods.md"}
    assert min(map(len, (LINKS, COMMANDS, NAMES))) > 10
    assert min(map(len, (CONFIGS, FILES))) > 3


@pytest.mark.parametrize(("page", "link"), LINKS, ids=name_of)
def test_a_link_leads_somewhere(page: Path, link: str) -> None:
    path, _, heading = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    assert target.is_relative_to(ROOT)
    if heading:
        assert heading in anchors(target)


@pytest.mark.parametrize(("page", "name"), COMMANDS, ids=name_of)
def test_a_command_is_there(page: Path, name: str) -> None:
    [commands] = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert name in commands.choices


@pytest.mark.parametrize("path", sorted({path for _, path in CONFIGS}))
def test_a_config_that_is_named_loads(path: str) -> None:
    load_config(ROOT / path)


@pytest.mark.parametrize(("page", "path"), FILES, ids=name_of)
def test_a_file_that_is_named_is_there(page: Path, path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("page", "name"), NAMES, ids=name_of)
def test_a_name_of_the_code_is_there(page: Path, name: str) -> None:
    """`plumbline.methods.losses.dpo_loss` is in plumbline/methods/losses.py, read without importing it."""
    parts = name.split(".")
    here, rest = ROOT / parts[0], parts[1:]
    while rest and (here / rest[0]).is_dir():
        here, rest = here / rest[0], rest[1:]
    if rest:
        here, rest = here / f"{rest[0]}.py", rest[1:]
    assert here.exists()
    body = ast.parse(here.read_text("utf-8")).body if rest else []
    for part in rest:
        [body] = [defined(node) for node in body if part in names(node)]


def names(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def defined(node: ast.stmt) -> list[ast.stmt]:
    """What is inside a class."""
    return node.body if isinstance(node, ast.ClassDef) else []


# docs/troubleshooting.md quotes messages after `> `, with … for what differs from case to case.

TROUBLES = ROOT / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"^> (.+)$", TROUBLES.read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every piece of text in the code of the rooms; an f-string is one piece, … where it puts something in."""
    found = []
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("quote", QUOTES)
def test_a_message_that_is_quoted_is_one_of_ours(texts: list[str], quote: str) -> None:
    pieces = [piece.strip(" :;,.()`'") for piece in quote.split("…")]
    assert any(len(piece) > 8 for piece in pieces), "too little of it to be found"
    for piece in pieces:
        assert any(piece in text for text in texts), f"{piece!r} is in no message"


def test_troubles_are_quoted() -> None:
    assert len(QUOTES) > 20
