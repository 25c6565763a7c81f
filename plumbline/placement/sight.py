"""Whether a run's directory will do, asked before a run starts: room, leave to write, nodes that must see it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from plumbline.config.demand import one_of
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.placement.start import Placed
from plumbline.runs.directory import check_run_dir


def check_seen(placed: Placed, run_dir: Path) -> str:
    """Who needs the run's directory is placed on nodes that see it. Raises ConfigError."""
    config, blind = placed.plan.config, placed.machine.blind
    roles: list[tuple[str, Mapping[str, float]]] = []
    merged = config.model.adapter is not None  # π0 lies in it
    if config.storage_path is None or merged:  # checkpoints go through the storage
        learn = [p for p in (config.sft, *config.pipelines) if p and p.trains]
        roles += [(f"the learner of {one.name}", one_of(one.learner)) for one in learn]
    if (config.sft or merged) and config.methods:
        roles.append(("a generator", one_of(config.fleet.generator)))
    for role, asked in roles:
        if count := sum(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in blind):
            stores = ", or give `storage_path`" if role != "a generator" and not merged else ""
            raise ConfigError(
                f"{run_dir}: {count} of the cluster's nodes, on which {role} may be placed, do not see it; name a "
                f"place that all nodes see with --run-dir{stores}"
            )
    return f"; not seen by {len(blind)} nodes, which need not" if blind else ""


def check_place(config: Config, run_dir: Path) -> str:
    """It is new or this run's, may be written, and has room. Raises ConfigError."""
    check_run_dir(config, run_dir)
    place = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    begun = (run_dir / "config.yaml").exists()
    remedy = "mend that, and the same command goes on" if begun else "name another place with --run-dir"
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{place}: not writable; {remedy}")
    if free < 1:
        raise ConfigError(f"{place}: {free:.2f} GiB free, a run needs at least 1; {remedy}")
    return f"{free:.1f} GiB free in {place}"
