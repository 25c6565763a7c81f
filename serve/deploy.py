"""An endpoint on Ray Serve: started beside a live run, or over what a run or a model left."""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ApplicationStatus

from plumbline.config.serving import Serve
from plumbline.errors import ConfigError, RunError, in_one_line
from plumbline.runs.promotions import Catalog
from serve.app import Endpoint, build_app
from serve.backends import Generators, Replicas
from serve.keys import Keys, check_bind, read_keys
from serve.replica import Replica, ReplicaSpec

APP = "plumbline"
PATIENCE_S = 120.0
"""For health checks: a busy machine is not a broken replica."""


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


def check_settings(settings: Serve) -> Keys:
    """The endpoint's API keys.

    Raises:
        ConfigError: it would be open to others without any, or its port is taken.
    """
    keys = read_keys(settings.api_keys)
    check_bind(settings.host, keys)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            reason = f"cannot be bound ({error.strerror})"
            raise ConfigError(f"serve.port: {settings.host}:{settings.port} {reason}; name another") from None
    return keys


def start_endpoint(settings: Serve, served: Served, keys: Keys, cpus: int = 1, gpus: float = 0) -> None:
    """Deploy it on the Ray that this process is connected to; `wait_for_endpoint` waits until it answers.

    Raises:
        RunError: Ray Serve did not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    target = serve.RunTarget(target=application(settings, served, keys, cpus, gpus), name=APP, route_prefix="/")
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RayError as error:
        raise RunError(f"Ray Serve did not start: {in_one_line(error)}") from None


def application(settings: Serve, served: Served, keys: Keys, cpus: int, gpus: float) -> Any:
    """The endpoint, and the engines of its own where it has some, as an application of Ray Serve."""
    ingress = serve.deployment(
        name="endpoint",
        num_replicas=1,
        max_ongoing_requests=10_000,  # the endpoint has a bound of its own, which answers 429
        health_check_timeout_s=PATIENCE_S,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Ingress))
    public = replace(served, replica=None)
    if served.replica is None:
        return ingress.bind(public, keys, settings)
    return ingress.bind(public, keys, settings, replicas(settings, served.replica, cpus, gpus))


async def wait_for_endpoint(settings: Serve) -> str:
    """Returns its address. Raises RunError where it does not come up."""
    while True:
        app = serve.status().applications.get(APP)
        if app is not None and app.status == ApplicationStatus.RUNNING:
            return f"http://{settings.host}:{settings.port}"
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
        health_check_timeout_s=PATIENCE_S,
        ray_actor_options=actor,
        **scale,
    )(Replica)
    return deployment.bind(spec)


def stop_endpoint() -> None:
    """End it on a cluster that goes on; a Ray of this process alone ends with all that it runs."""
    if os.environ.get("RAY_ADDRESS"):
        serve.delete(APP)
