"""The command line. It parses, shows progress, turns errors into one line and an exit code; the work is elsewhere.

Exit codes: 0 done; 1 failed at run time, what was saved and how to resume is said; 2 wrong use; 130 interrupted; 141
the output was closed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cli.preparing import add_commands as add_preparing
from cli.preparing import add_overrides, columns_of
from cli.serving import add_commands as add_serving
from cli.tuning import add_commands as add_tuning
from plumbline.errors import PlumblineError, UserError
from plumbline.importing import ours_first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    sys.path[:] = ours_first(sys.path)
    options = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except UserError as error:
        print(f"plumbline: {error}", file=sys.stderr)
        return 2
    except PlumblineError as error:
        print(f"plumbline: {error}", file=sys.stderr)
        tell_resume(options)
        return 1
    except KeyboardInterrupt:
        print("plumbline: interrupted; all steps that are done are saved", file=sys.stderr)
        tell_resume(options)
        return 130
    except BrokenPipeError:  # whoever reads the output has enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the end would fail again
        return 141


def parser() -> argparse.ArgumentParser:
    """All commands. Imports nothing heavy: `plumbline --help` answers at once."""
    top = argparse.ArgumentParser(
        prog="plumbline", description="Align language models without human preference labels, on Ray and vLLM."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("run", help="run a config, or continue the run directory that holds it")
    one.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    add_overrides(one)
    one.add_argument(
        "--deterministic",
        dest="overrides",
        action="append_const",
        const="deterministic=true",
        help="as --set deterministic=true: the same rollouts and weights each time, byte by byte",
    )
    one.add_argument("--run-dir", type=Path, help="default: runs/NAME, with the config's name")
    one.set_defaults(command=run_command)

    one = commands.add_parser("resume", help="continue a run at the step it stopped at")
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.set_defaults(command=resume_command)

    one = commands.add_parser("evaluate", help="compare versions of a run, or models, on held-out prompts")
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.add_argument(
        "--of",
        nargs="+",
        metavar="MODEL",
        help="base, ple, ple@12, or a model: a directory or hub name; default: base and the newest",
    )
    one.add_argument("--prompts", type=int, help="held-out prompts; default: the config's")
    one.set_defaults(command=evaluate_command)

    one = commands.add_parser("report", help="write RUN_DIR/report.html: curves, tables and answers on one page")
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.set_defaults(command=report_command)

    one = commands.add_parser("compare", help="runs beside each other on one page, rewards paired by prompt")
    one.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="two or more; the first is the measure")
    one.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    one.set_defaults(command=compare_command)

    one = commands.add_parser("watch", help="the report in a browser while the run goes on")
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.add_argument("--port", type=int, default=8080, help="on 127.0.0.1; 0 takes a free one (default: 8080)")
    one.set_defaults(command=watch_command)

    one = commands.add_parser("export", help="write a version as a model that any tool loads, or a pipeline's pairs")
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.add_argument("name", metavar="NAME", help="ple, ple@12 or base; with --pairs a pipeline, such as dlma")
    one.add_argument("out", metavar="OUT", type=Path, help="a directory that is not there; with --pairs a JSONL file")
    kind = one.add_mutually_exclusive_group()
    kind.add_argument("--adapter", action="store_true", help="the adapter alone, in place of base and adapter merged")
    kind.add_argument("--pairs", action="store_true", help="its preference pairs, as TRL reads them")
    one.add_argument("--push", metavar="ORG/MODEL", help="push what was written to the Hugging Face hub, private there")
    one.set_defaults(command=export_command)

    add_preparing(commands)
    add_tuning(commands)
    add_serving(commands)

    one = commands.add_parser("chat", help="talk to the models of any OpenAI-compatible server, also side by side")
    one.add_argument("--url", help="of the API; default: OPENAI_BASE_URL, or http://127.0.0.1:8000/v1")
    one.add_argument("--key-file", type=Path, metavar="FILE", help="its first line is the key; default: OPENAI_API_KEY")
    one.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="several answer side by side; default: the first"
    )
    one.add_argument("--system", metavar="TEXT", help="a system text before every conversation")
    one.add_argument("--temperature", type=float, help="default: the server's")
    one.add_argument("--max-tokens", type=int, help="of an answer; default: the server's")
    one.add_argument("--ask", metavar="TEXT", help="ask this once, print the answer, and end")
    one.set_defaults(command=chat_command)

    one = commands.add_parser("theory", help="estimate how many negatives on one positive match balanced pairs")
    one.add_argument("model", metavar="MODEL", help="directory or hub name: policy and reference in one, as DPO starts")
    one.add_argument("data", metavar="DATA", help="a preference file or dataset, or a run's directory of pairs")
    one.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    one.add_argument("--prompts", type=int, default=64, help="drawn at random; at least 8 (default: 64)")
    one.add_argument("--pairs", type=float, nargs="+", default=[2, 3, 4], metavar="L", help="default: 2 3 4")
    one.add_argument("--beta", type=float, default=0.1, help="DPO's; scales the variances alone (default: 0.1)")
    one.add_argument("--max-len", type=int, default=512, help="longer answers are left out, in tokens (default: 512)")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(command=theory_command)
    return top


def run_command(options: argparse.Namespace) -> int:
    """`plumbline run`."""
    from plumbline.config.file import load_config

    config = load_config(options.config, options.overrides)
    options.run_dir = (options.run_dir or Path("runs") / config.name).absolute()
    return _run(config, options.run_dir)


def resume_command(options: argparse.Namespace) -> int:
    """`plumbline resume`."""
    from plumbline.config.file import load_config

    options.run_dir = _existing(options.run_dir)
    return _run(load_config(options.run_dir / "config.yaml"), options.run_dir)


def _run(config: Any, run_dir: Path) -> int:
    from actors.engines.check import check_engine
    from actors.machine import find_machine
    from plumbline.doctor import check

    # Before Ray and vLLM are even imported: wrong input is told at once.
    checked = check(config, run_dir, check_engine, partial(find_machine, run_dir))

    from cli.display import Display, duration, result_text
    from cli.guard import run_guard
    from pipelines.run import run
    from plumbline.report.balance import balance
    from plumbline.report.files import read_events

    started = time.monotonic()
    endpoint = None
    if config.serve.enabled:
        from serve.live import LiveEndpoint

        endpoint = LiveEndpoint(checked.placed.plan.config)
    with run_guard(run_dir), Display() as display:
        result = run(run_dir, display, checked, endpoint)
    print(result_text(result))
    if said := balance(read_events(run_dir / "events.jsonl")[0]):
        print(said)
    print(f"done in {duration(time.monotonic() - started)}; everything is in {run_dir}")
    return 0


def evaluate_command(options: argparse.Namespace) -> int:
    """`plumbline evaluate`."""
    from plumbline.runs.policies import servable

    run_dir = _existing(options.run_dir)

    from actors.machine import find_machine
    from cli.display import Display, result_text
    from cli.guard import guarded
    from pipelines.run import compare

    with guarded("evaluation", f"begin it again by: plumbline evaluate {options.run_dir}"), Display() as display:
        result = compare(run_dir, options.of or ["base", *servable(run_dir)], options.prompts, display, find_machine)
    print(result_text(result))
    return 0


def report_command(options: argparse.Namespace) -> int:
    """`plumbline report`."""
    from plumbline.report.page import write_report

    print(write_report(options.run_dir))
    return 0


def compare_command(options: argparse.Namespace) -> int:
    """`plumbline compare`."""
    if len(options.run_dirs) < 2:
        raise UserError(f"{options.run_dirs[0]}: is one run; name two or more")

    from plumbline.report.compare import compare_runs

    print(compare_runs(options.run_dirs, options.out))
    print(f"\n{options.out.absolute()}")
    return 0


def watch_command(options: argparse.Namespace) -> int:
    """`plumbline watch`: Ctrl-C is how it ends."""
    try:
        from plumbline.report.live import open_server

        with open_server(options.run_dir, options.port) as server:
            print(f"{options.run_dir} on {server.url} (Ctrl-C ends)", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print()
    return 0


def export_command(options: argparse.Namespace) -> int:
    """`plumbline export`."""
    run_dir = _existing(options.run_dir)

    from plumbline.runs.export import export_model, export_pairs
    from plumbline.runs.push import check_push, push_model

    if options.pairs:
        if options.push:
            raise UserError("--push: pushes models, and --pairs writes rows; leave one of them out")
        print(f"{options.out}: {export_pairs(run_dir, options.name, options.out)} pairs")
        return 0
    if options.push:
        check_push(options.push)
    print(f"{options.out}: {export_model(run_dir, options.name, options.out, adapter=options.adapter)}")
    if options.push:
        print(f"pushed to {push_model(options.out, options.push, f'{options.name} of {run_dir.name}')}")
    return 0


def chat_command(options: argparse.Namespace) -> int:
    """`plumbline chat`."""
    from cli.chat import chat

    return chat(options)


def theory_command(options: argparse.Namespace) -> int:
    """`plumbline theory`."""
    if wrong := [count for count in options.pairs if not count >= 1]:
        raise UserError(f"--pairs {wrong[0]:g}: it should be 1 or more, a number of balanced pairs")

    from cli.theory import measure, theory_text
    from plumbline.runs.hub import named_model

    theory = measure(
        named_model(options.model, "MODEL"),
        options.data,
        columns=columns_of(options.column),
        prompts=options.prompts,
        beta=options.beta,
        max_len=options.max_len,
        seed=options.seed,
    )
    print(theory_text(theory, options.pairs))
    return 0


def _existing(run_dir: Path) -> Path:
    """A run's directory, absolute. Raises UserError where it is none."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: no run directory: there is no config.yaml in it; start one by `plumbline run`")
    return run_dir.absolute()


def tell_resume(options: argparse.Namespace) -> None:
    """How to go on, where there is something to go on from."""
    run_dir = getattr(options, "run_dir", None)
    if run_dir is not None and (run_dir / "config.yaml").exists():
        print(f"plumbline: continue with: plumbline resume {run_dir}", file=sys.stderr)
    elif run_dir is not None and (run_dir / "tune.json").exists():
        print(f"plumbline: the same command goes on there, in {run_dir}", file=sys.stderr)
