"""What there is to place a run on: this machine, or the cluster of RAY_ADDRESS. Ray is imported for a cluster alone."""

import os
from pathlib import Path

from plumbline.placement.machine import Machine, this_machine


def find_machine(run_dir: Path | None = None) -> Machine:
    """Joins a cluster for a moment, to ask its nodes; also whether they see `run_dir`.

    Raises:
        ConfigError: the cluster does not answer, or its GPUs cannot be seen.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return this_machine()
    from actors.spawn import look_at_cluster

    return look_at_cluster(run_dir)
