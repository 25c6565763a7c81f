"""The Ray that a run lives in: a cluster that is there, or one of this machine alone that ends with the run."""

import contextlib
import logging
import os
import signal
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import cloudpickle
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray._private.authentication.authentication_token_setup import _enable_token_auth

from actors.metrics import RUN_VARIABLE
from plumbline import importing
from plumbline.errors import ConfigError, RunError, in_one_line

_PLENTY = 10_000
"""What a Ray of this machine alone offers of every resource by name: it plays all roles."""

_ANSWER_S = 10.0

_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead learner worker is noticed within this
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process a learner that only logs
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",  # an engine's own processes die with it
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # what nobody waits for any more is of a process whose loss was told
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine is not a broken proxy
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def start_ray(cpus: int, resources: Iterable[str] = (), run: str = "") -> None:
    """Join the cluster of RAY_ADDRESS (a submitted job has one), else start Ray here.

    Args:
        cpus: what a Ray started here has at least.
        resources: names of resources that it offers too, so that a cluster's config also runs on one machine.
        run: what metrics of all processes are told apart by.

    Raises:
        ConfigError: there is no Ray at RAY_ADDRESS, or it refuses this user's token.
        RunError: Ray did not start here.
    """
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    # Actors import what the driver can: our packages, and a reward function beside the config.
    paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    os.environ[RUN_VARIABLE] = run
    settings = {key: os.environ[key] for key in (*_DEFAULTS, RUN_VARIABLE)}
    common["runtime_env"] = {
        "env_vars": {"PYTHONPATH": paths, **settings},
        "worker_process_setup_hook": importing.worker_hook(),
    }
    ray_worker.print_to_stdstream = _note
    cloudpickle.register_pickle_by_value(importing)  # the hook comes before a worker can import anything of ours
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
        # These variables come from this process, which has those of a job's own runtime_env: no conflict is one.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        try:
            ray.init(**common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"RAY_ADDRESS: {address}: there is no Ray to join ({in_one_line(error)})") from None
    else:
        common["resources"] = dict.fromkeys(resources, _PLENTY)
        make_token()
        try:
            ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **common)
        except Exception as error:  # Ray's own, of no type: a machine too busy to start it in time, a full disk
            ray.shutdown()
            raise RunError(f"Ray did not start on this machine: {in_one_line(error)}") from None
    # Ray's subreaper ignores SIGCHLD in this process too, and then every `subprocess` here would return 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def check_address(address: str) -> None:
    """Ask a cluster's GCS for its id, once: `ray.init` asks a refused one for 20 s, and names no token.

    Raises:
        ConfigError: nobody answers there, or the token is refused.
    """
    if ":" not in address or "://" in address:  # `auto`, or another protocol
        return
    token, origin = read_token()
    metadata = (("authorization", f"Bearer {token}"),)  # a cluster without tokens does not look at it
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=_ANSWER_S, metadata=metadata)
            if "RAY_AUTH_MODE" not in os.environ and _refused(ask):
                _enable_token_auth()  # who joins a cluster has to, Ray does it for one of its own alone
        except grpc.RpcError as error:
            code: Any = error.code()  # type: ignore[attr-defined]
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(
                    f"RAY_ADDRESS: {address}: refuses the token of {origin}; put that cluster's there, which "
                    "its head has in ~/.ray/auth_token or RAY_AUTH_TOKEN"
                ) from None
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ConfigError(
                    f"RAY_ADDRESS: {address}: no Ray answers there; start it, or unset RAY_ADDRESS for one of this "
                    "machine"
                ) from None


def _refused(ask: Any) -> bool:
    """Whether a cluster refuses who has no token."""
    try:
        ask(b"", timeout=_ANSWER_S)
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    return False


def read_token() -> tuple[str, str]:
    """Ray's token of this user, empty where there is none, and where it stands, in a message's words. Ray's own reader
    knows of none before `ray.init`."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    origin = f"{path} (RAY_AUTH_TOKEN_PATH)" if named else str(path)
    try:
        return path.read_text("utf-8").strip(), origin
    except (OSError, UnicodeError):
        return "", f"{origin}, which cannot be read"


def _note(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """In place of Ray's own printing of its errors: they are of calls that were pending when a run ended, of actors
    that are started anew; what a run says itself tells its user more."""
    logging.getLogger("ray.errors").info("%s", "\n".join(data["lines"]))


def make_token() -> None:
    """Ray's token of this user, where there is none. Ray makes it too, but of two that start at once one may read a
    file that the other has yet to fill."""
    path = Path.home() / ".ray" / "auth_token"
    if path.exists() or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".auth_token.{uuid.uuid4().hex}")
    aside.touch(mode=0o600)
    aside.write_text(generate_new_authentication_token(), encoding="utf-8")
    with contextlib.suppress(FileExistsError):  # another's was there first
        os.link(aside, path)
    aside.unlink()


def missing(asked: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Resources of which all nodes together offer less now than is asked for; with what is asked, and what there is."""
    offered = ray.cluster_resources()
    each = ((name, amount, offered.get(name, 0.0)) for name, amount in sorted(asked.items()))
    return [(name, amount, there) for name, amount, there in each if amount > there + 1e-6]


def free() -> Mapping[str, float]:
    """Resources of all nodes that no actor holds now."""
    return ray.available_resources()


def stop_ray() -> None:
    """Leave the cluster; a local one ends with all its processes."""
    ray.shutdown()
