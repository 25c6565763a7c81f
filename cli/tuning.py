"""`plumbline tune`: rates found by successive halving, within a budget of wall time."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.preparing import add_overrides
from plumbline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from plumbline.config.tree import Config
    from plumbline.tuning.halving import Bounds


def add_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    """Its options."""
    one = commands.add_parser("tune", help="find learning rates: short runs side by side, the better half longer")
    one.add_argument("config", metavar="CONFIG")
    one.add_argument("--budget", required=True, help="wall time for each pipeline, such as 90s, 10m or 1.5h")
    add_overrides(one)
    one.add_argument("--run-dir", type=Path, help="default: runs/NAME-tune, with the config's name")
    one.add_argument("--pipeline", action="append", default=[], metavar="NAME", help="default: all that train adapters")
    one.add_argument(
        "--over",
        nargs="+",
        default=[],
        metavar="KEY=VALUES",
        help="such as lr=1e-4,3e-4,1e-3 beta=0.05,0.1 tau0=0.2,0.5",
    )
    one.add_argument("--prompts", type=int, default=128, help="held-out prompts, at most (default: 128)")
    one.add_argument(
        "--max-ppl-rise", type=float, default=0.25, metavar="X", help="of references, as a share (default: 0.25)"
    )
    one.add_argument(
        "--max-base-ppl", type=float, default=2.0, metavar="X", help="π0's of the answers, times its own (default: 2)"
    )
    one.add_argument(
        "--length", type=float, nargs=2, default=[0.5, 2.0], metavar="X", help="tokens, times π0's (default: 0.5 2)"
    )
    one.add_argument(
        "--min-distinct", type=float, default=0.5, metavar="X", help="distinct-2, times π0's (default: 0.5)"
    )
    one.set_defaults(command=tune_command)


def tune_command(options: argparse.Namespace) -> int:
    """`plumbline tune`: 1 where some pipeline has nothing to recommend."""
    from plumbline.config.file import load_config
    from plumbline.tuning.arms import arms_of, check_over, draw_config, draws, parse_over, rung_config, tuned_pipelines
    from plumbline.tuning.data import data_of
    from plumbline.tuning.halving import parse_budget
    from plumbline.tuning.ledger import open_ledger

    bounds, budget, over = _bounds(options), parse_budget(options.budget), parse_over(options.over)
    config = load_config(options.config, options.overrides)
    sections = tuned_pipelines(config, options.pipeline, options.config)
    check_over(over, sections)
    _check(config, options.config)
    directory = options.run_dir = (options.run_dir or Path("runs") / f"{config.name}-tune").absolute()
    for section in sections:  # a value out of its bounds is told at once
        rung_config(config, section, arms_of(section, over), 1, 1, data_of(directory, 1), None)
        if draws(section):
            draw_config(config, section, 1, data_of(directory, 1), None)
    asked = {
        "budget": budget,
        "over": over,
        "pipeline": [section.name for section in sections],
        "prompts": options.prompts,
        "max-ppl-rise": bounds.max_ppl_rise,
        "max-base-ppl": bounds.max_base_ppl,
        "length": list(bounds.length),
        "min-distinct": bounds.min_distinct,
    }
    ledger = open_ledger(directory, config, asked)

    from actors.engines.check import check_engine
    from actors.machine import find_machine
    from plumbline.config.serving import Serve
    from plumbline.config.tracking import Tracking
    from plumbline.doctor import check
    from plumbline.runs.disk import write_text, writing
    from plumbline.tuning.data import full_steps, set_aside, write_data
    from plumbline.tuning.plot import plot
    from plumbline.tuning.result import recommended, said, table
    from plumbline.tuning.series import Plan, tune

    quiet = {"serve": Serve(), "tracking": Tracking(tensorboard=False), "storage_path": None}
    checked = check(
        config.model_copy(update=quiet), directory / "whole", check_engine, partial(find_machine, directory)
    )
    heldout, rows = set_aside(config, checked.rows, sections, options.prompts)
    data = data_of(directory, len(heldout), aside=rows is not checked.rows)
    if data.aside:
        print(
            f"{len(heldout)} prompts of data.train are judged on, and not learnt from: data.heldout has no more of them"
        )
    if not ledger.rungs:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        write_data(data, heldout, rows, sections, config.seed)
        ledger.save()
    plan = Plan(
        over=over,
        bounds=bounds,
        budget=budget,
        data=data,
        full={section.name: full_steps(section, rows) for section in sections},
    )
    outcomes = [tune(ledger, section, plan, _start, partial(print, flush=True)) for section in sections]
    print(f"\n{table(outcomes, bounds)}\n")
    for outcome in outcomes:
        print("\n".join(said(outcome, bounds, budget)))
    write_text(directory / "tune.svg", plot(outcomes, bounds))
    print(f"plot: {directory / 'tune.svg'}")
    if any(outcome.best for outcome in outcomes):
        write_text(directory / "recommended.yaml", recommended(config, outcomes, options.config))
        print(f"go on with: plumbline run {directory / 'recommended.yaml'}")
    return 0 if all(outcome.best for outcome in outcomes) else 1


def _bounds(options: argparse.Namespace) -> "Bounds":
    from plumbline.tuning.halving import Bounds

    low, high = options.length
    if not 0 <= low < 1 < high:
        raise UserError(f"--length {low:g} {high:g}: should be a number below 1 and one above, such as 0.5 2")
    for name, least in (("max_ppl_rise", 0), ("max_base_ppl", 1), ("min_distinct", 0), ("prompts", 1)):
        value = getattr(options, name)
        if not least <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: should be {least} or more")
    return Bounds(
        max_ppl_rise=options.max_ppl_rise,
        max_base_ppl=options.max_base_ppl,
        length=(low, high),
        min_distinct=options.min_distinct,
    )


def _check(config: "Config", origin: str) -> None:
    """Raises ConfigError where arms could not be judged."""
    there = {"reward": config.reward, "evaluation": config.evaluation, "data.heldout": config.data.heldout}
    if missing := [f"`{key}`" for key, value in there.items() if value is None]:
        raise ConfigError(
            f"{origin}: to tune, it needs {' and '.join(missing)}: arms are judged by held-out reward; `plumbline init "
            "--reward --heldout FILE` writes all three"
        )


def _start(config: "Config", directory: Path) -> None:
    """A rung's run, from where it stands to its end."""
    from actors.engines.check import check_engine
    from actors.machine import find_machine
    from plumbline.doctor import check

    checked = check(config, directory, check_engine, partial(find_machine, directory))

    from cli.display import Display
    from cli.guard import guarded
    from pipelines.run import run

    with guarded("tuning", "all steps that are done are saved", "the same command goes on there"), Display() as display:
        run(directory, display, checked, None)
