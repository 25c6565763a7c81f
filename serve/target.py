"""`plumbline serve`: the endpoint over a finished run's directory, or over a model's."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.cluster import start_ray, stop_ray
from actors.engines.seam import EngineSpec, engine_spec
from actors.machine import find_machine
from actors.proof import TOLERANCE, tolerance_of
from plumbline.config.file import load_config
from plumbline.config.fleet import GeneratorFleet
from plumbline.config.section import planned
from plumbline.config.serving import Serve
from plumbline.config.tree import Config
from plumbline.data.tokenizer import run_tokenizer
from plumbline.errors import ModelError, RunError, UserError
from plumbline.models.positions import positions, read_config
from plumbline.placement.lengths import settle_lengths
from plumbline.placement.memory import adapter_slots
from plumbline.placement.sizes import read_shape
from plumbline.placement.start import place_engines, resolve_device, resolve_dtype, run_device
from plumbline.runs.hub import fetched, pinned
from plumbline.runs.models import check_causal
from plumbline.runs.policies import base_directory, read_probe
from plumbline.runs.promotions import Catalog
from serve.deploy import (
    Place,
    Served,
    check_settings,
    deployed,
    is_there,
    start_endpoint,
    stop_endpoint,
    wait_for_endpoint,
)
from serve.replica import ReplicaSpec

LOOK_S = 5.0
"""How often to look whether it is still there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is served, a run's `directory` or a model's, with which settings, by engines of how many processors."""

    directory: Path
    served: Served
    settings: Serve
    cpus: int
    gpus: float

    @property
    def names(self) -> list[str]:
        """Model names, aliases only."""
        return list(Catalog(self.served.run_dir).aliases())


def read_target(path: Path, overrides: dict[str, object]) -> Target:
    """A run's directory, or a model's.

    Args:
        overrides: keys of `serve` that replace those of the run's config.

    Raises:
        ModelError: it is neither.
    """
    if (path / "config.yaml").is_file():
        config = fetched(pinned(load_config(path / "config.yaml"), path))
        settings = _settings(config.serve, overrides)
        generator, replica = _run_replica(config, path, settings)
    elif (path / "config.json").is_file():
        settings = _settings(Serve(), overrides)
        generator, replica = _model_replica(path, settings)
    else:
        raise ModelError(f"{path}: neither a run's directory (no config.yaml in it) nor a model's (no config.json)")
    run_dir = replica.run_dir
    return Target(
        directory=path,
        served=Served(run_dir=run_dir, replica=replica),
        settings=settings,
        cpus=planned(generator.cpus),
        gpus=planned(generator.gpus),
    )


def _settings(settings: Serve, overrides: dict[str, object]) -> Serve:
    return Serve.model_validate({**settings.model_dump(), **overrides, "placement": "replicas"})


def _run_replica(config: Config, run_dir: Path, settings: Serve) -> tuple[GeneratorFleet, ReplicaSpec]:
    """Engines over a run's versions, with the machine to themselves: the run has ended."""
    machine, base, versions = find_machine(), base_directory(config, run_dir), 1 + settings.pinned
    config, device = settle_lengths(config, base), run_device(config, machine)
    dtype = resolve_dtype(config.model.dtype, device)
    generator = place_engines(
        config.fleet.generator,
        machine,
        device,
        dtype,
        read_shape(Path(base)),
        engine=config.fleet.engine,
        replicas=settings.most_replicas,
        max_len=planned(config.model.max_len),
        slots=adapter_slots(config, versions),
    )
    fleet = config.fleet.model_copy(update={"generator": generator})
    spec = engine_spec(
        config.model_copy(update={"fleet": fleet}),
        base,
        dtype,
        device,
        versions=versions,
        seats=generator.max_num_seqs,
        chat_template=run_tokenizer(config).get_chat_template(),
    )
    replica = ReplicaSpec(
        engine=spec,
        probe=tuple(read_probe(run_dir)),
        tolerance=tolerance_of(config, dtype),
        run_dir=run_dir,
        store_name=None,
    )
    return generator, replica


def _model_replica(path: Path, settings: Serve) -> tuple[GeneratorFleet, ReplicaSpec]:
    machine = find_machine()
    check_causal(str(path), "MODEL_DIR")
    longest = positions(read_config(str(path), "MODEL_DIR")) or 2048
    device = resolve_device("auto", machine)
    dtype, max_len = resolve_dtype("auto", device), min(longest, 8192)
    generator = place_engines(
        GeneratorFleet(),
        machine,
        device,
        dtype,
        read_shape(path),
        replicas=settings.most_replicas,
        max_len=max_len,
        slots=(0, 0),
    )
    spec = EngineSpec(
        model_path=str(path),
        dtype=dtype,
        device=device,
        max_model_len=max_len,
        max_num_seqs=generator.max_num_seqs,
        max_lora_rank=8,
        max_adapters=1,
        threads=planned(generator.cpus),
        kv_cache_gib=generator.kv_cache_gib,
        memory_share=planned(generator.memory_share),
        seed=0,
        seats=generator.max_num_seqs,
    )
    return generator, ReplicaSpec(engine=spec, probe=(), tolerance=TOLERANCE[dtype], run_dir=None, store_name=None)


def serve_target(target: Target, ready: Callable[[str], None]) -> None:
    """Serve until interrupted, or until it is ended from elsewhere; `ready` is told the address once it answers.

    Raises:
        UserError: before Ray is started, where the settings cannot be served; or the directory is served already.
        RunError: it did not come up, or another process ended it.
    """
    keys = check_settings(target.settings)
    start_ray(target.settings.most_replicas * target.cpus + 1, target.settings.resources)
    try:
        if there := deployed(target.directory):
            raise UserError(
                f"{target.directory}: is served already on {there.url}/v1; "
                f"`plumbline serve {target.directory} --stop` ends that"
            )
        place = start_endpoint(target.settings, target.served, keys, target.directory, target.cpus, target.gpus)
        try:
            asyncio.run(_serve(place, ready))
        finally:
            stop_endpoint(place)
    finally:
        stop_ray()


async def _serve(place: Place, ready: Callable[[str], None]) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        ready(await wait_for_endpoint(place))
        while await asyncio.to_thread(is_there, place):
            await asyncio.sleep(LOOK_S)
    except asyncio.CancelledError:  # that is how serving ends
        return
    raise RunError(f"the endpoint on {place.url}/v1 was ended from elsewhere")


def stop_target(directory: Path) -> str | None:
    """End what another process left on the cluster of RAY_ADDRESS; returns the address that it had."""
    start_ray(0)
    try:
        place = deployed(directory)
        if place is not None:
            stop_endpoint(place)
        return place and place.url
    finally:
        stop_ray()
