"""An endpoint on Ray Serve: started beside a live run, or over what a run or a model left.

A cluster has one Ray Serve with one address, which endpoints share: each is an application of its own, and the first
answers at `/v1`, one that comes beside it at `/NAME/v1`.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from plumbline.config.serving import Serve
from plumbline.errors import ConfigError, RunError, in_one_line
from plumbline.runs.promotions import Catalog
from serve.app import Endpoint, build_app
from serve.backends import Generators, Replicas
from serve.keys import Keys, check_bind, read_keys
from serve.replica import Replica, ReplicaSpec

PATIENCE_S = 120.0
"""For health checks: a busy machine is not a broken replica."""
HEALTH_S = 2.0
"""Between them: after three that fail Ray Serve starts an engine anew."""
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
"""Of all of Ray Serve's processes: what users ask for is not logged."""
_GONE = (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What an endpoint answers with.

    Attributes:
        run_dir: where versions and promotions lie; None for a plain model.
        live: policies of a run that trains meanwhile; None: what the directory holds.
        store: the live run's policy store, for `placement: pool`.
        replica: what engines of its own are started with, for `placement: replicas`.
    """

    run_dir: Path | None
    live: tuple[str, ...] | None = None
    store: Any = None
    replica: ReplicaSpec | None = None


class Ingress:
    """The deployment that speaks HTTP. It imports no engine."""

    def __init__(self, served: Served, keys: Keys, settings: Serve, handle: Any = None) -> None:
        backend = Replicas(handle) if handle is not None else Generators(served.store)
        self._endpoint = Endpoint(Catalog(served.run_dir, served.live), backend, keys, settings.limits)

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._endpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an endpoint is: the name of its application, and the address before `/v1`."""

    app: str
    url: str


def check_settings(settings: Serve) -> Keys:
    """The endpoint's API keys.

    Raises:
        ConfigError: it would be open to others without any, or its port is taken, which on a cluster is for Ray Serve
            to say.
    """
    keys = read_keys(settings.api_keys)
    check_bind(settings.host, keys)
    if not os.environ.get("RAY_ADDRESS"):
        check_port(settings.host, settings.port)
    return keys


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where it cannot be bound on this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"cannot be bound ({error.strerror})"
            raise ConfigError(f"serve.port: {host}:{port} {reason}; name another") from None


def app_name(directory: Path) -> str:
    """The application that serves a run's directory, or a model's: the same whoever asks, and no other's."""
    mark = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:8]
    return f"{_in_urls(directory)}-{mark}"


def _in_urls(directory: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.absolute().name) or "endpoint"


def free_route(directory: Path, taken: Mapping[str, str]) -> str:
    """Where an endpoint answers beside others: `/` where that is free, else `/NAME`.

    Args:
        taken: applications by the routes that they have.
    """
    name = app_name(directory)
    return next(route for route in ("/", f"/{_in_urls(directory)}", f"/{name}") if taken.get(route, name) == name)


def start_endpoint(
    settings: Serve, served: Served, keys: Keys, directory: Path, cpus: int = 1, gpus: float = 0
) -> Place:
    """Deploy it on the Ray that this process is connected to; `wait_for_endpoint` waits until it answers.

    What was left of an endpoint over the same directory is replaced.

    Args:
        directory: the run's, or the model's; what others on the cluster tell it from theirs by.

    Raises:
        ConfigError: Ray Serve runs here already, at an address that others reach, and there are no keys.
        RunError: Ray Serve did not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
            logging_config=QUIET,
        )
        host, port, taken = _there()
        check_bind(host, keys)
        app, route = app_name(directory), free_route(directory, taken)
        endpoint = application(settings, served, keys, cpus, gpus, driver_node())
        target = serve.RunTarget(target=endpoint, name=app, route_prefix=route, logging_config=QUIET)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except (RayError, RayServeException) as error:
        raise RunError(f"Ray Serve did not start: {in_one_line(error)}") from None
    return Place(app=app, url=f"http://{host}:{port}{route.rstrip('/')}")


def _there() -> tuple[str, int, Mapping[str, str]]:
    """Host and port of this cluster's Ray Serve, and its applications by the routes that they have."""
    # `serve.status`, the public way, says neither; the dashboard does, where a cluster has one.
    details: Any = _get_global_client().get_serve_details()  # type: ignore[union-attr]
    applications = {name: app for name, app in details["applications"].items() if app["status"] not in _GONE}
    taken = {app["route_prefix"]: name for name, app in applications.items() if app["route_prefix"]}
    return details["http_options"]["host"], details["http_options"]["port"], taken


def deployed(directory: Path) -> Place | None:
    """Where an endpoint over `directory` is on the Ray that this process is connected to, if there is one."""
    if _get_global_client(raise_if_no_controller_running=False) is None:
        return None
    host, port, taken = _there()
    routes = {name: route for route, name in taken.items()}
    app = app_name(directory)
    return Place(app=app, url=f"http://{host}:{port}{routes[app].rstrip('/')}") if app in routes else None


def driver_node() -> Mapping[str, float]:
    """A little of the resource that the driver's node alone offers: whoever asks for it is started there."""
    own = ray.get_runtime_context().get_node_id()
    return {f"node:{node['NodeManagerAddress']}": 0.001 for node in ray.nodes() if node["NodeID"] == own}


def application(
    settings: Serve, served: Served, keys: Keys, cpus: int, gpus: float, node: Mapping[str, float] | None = None
) -> Any:
    """The endpoint, and the engines of its own where it has some, as an application of Ray Serve.

    Args:
        node: the resource of a node that has the run's directory, where not all nodes have it.
    """
    ingress = serve.deployment(
        name="endpoint",
        num_replicas=1,
        max_ongoing_requests=10_000,  # the endpoint has a bound of its own, which answers 429
        health_check_timeout_s=PATIENCE_S,
        ray_actor_options={"num_cpus": 0, "resources": dict(node or {})},
        logging_config=QUIET,
    )(serve.ingress()(Ingress))
    public = replace(served, replica=None)
    if served.replica is None:
        return ingress.bind(public, keys, settings)
    return ingress.bind(public, keys, settings, replicas(settings, replace(served.replica, node=node), cpus, gpus))


def is_there(place: Place) -> bool:
    """Whether nobody has ended it."""
    try:
        app = serve.status().applications.get(place.app)
    except RayError:  # Ray Serve's controller is being started anew
        return True
    return app is not None and app.status not in _GONE


async def wait_for_endpoint(place: Place) -> str:
    """Returns its address. Raises RunError where it does not come up."""
    while True:
        app = serve.status().applications.get(place.app)
        if app is not None and app.status == ApplicationStatus.RUNNING:
            return place.url
        if app is not None and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            failed = [d.message for d in app.deployments.values() if d.message] or [app.message]
            lines = [line for line in failed[0].splitlines() if line.strip()] or ["no reason was given"]
            raise RunError(f"the endpoint did not come up: {lines[-1].strip()}")
        await asyncio.sleep(0.25)


def replicas(settings: Serve, spec: ReplicaSpec, cpus: int, gpus: float) -> Any:
    """Engines of the endpoint's own, between the bounds."""
    scale: Mapping[str, Any] = {"num_replicas": settings.replicas}
    seats = spec.engine.seats
    if isinstance(settings.replicas, tuple):
        least, most = settings.replicas
        # Before users are told 429, there should be as many engines as there may be.
        each = max(1, min(seats // 2, settings.limits.in_flight // most))
        bounds = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=each)
        scale = {"autoscaling_config": bounds}
    actor = {"num_cpus": cpus, "num_gpus": gpus, "resources": settings.resources}
    deployment = serve.deployment(
        name="engine",
        max_ongoing_requests=2 * seats,
        max_queued_requests=settings.limits.in_flight,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=PATIENCE_S,
        ray_actor_options=actor,
        logging_config=QUIET,
        **scale,
    )(Replica)
    return deployment.bind(spec)


def stop_endpoint(place: Place) -> None:
    """End this one alone, on a cluster that goes on; a Ray of this process alone ends with all that it runs."""
    if os.environ.get("RAY_ADDRESS"):
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # ended already, or the cluster has
            serve.delete(place.app)
