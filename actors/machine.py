"""What there is to place a run on: this machine, or the cluster of RAY_ADDRESS. Ray is imported for a cluster alone."""

import os

from plumbline.placement.machine import Machine, this_machine


def find_machine() -> Machine:
    """Joins a cluster for a moment, to ask its nodes.

    Raises:
        ConfigError: the cluster does not answer, or its GPUs cannot be seen.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return this_machine()
    from actors.spawn import look_at_cluster

    return look_at_cluster()
