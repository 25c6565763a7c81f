"""The endpoint beside a run: users ask the policies while they are being trained."""

from actors.engines.seam import engine_spec
from actors.engines.start import resolve_engine
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.runs.endpoint import LiveRun
from serve.deploy import Place, Served, check_settings, start_endpoint, stop_endpoint, wait_for_endpoint
from serve.replica import ReplicaSpec


class LiveEndpoint:
    """A `plumbline.runs.endpoint.RunEndpoint` on Ray Serve, by a config that was placed.

    Raises:
        ConfigError: the run cannot be served so.
    """

    def __init__(self, config: Config) -> None:
        if not config.methods:
            raise ConfigError(
                "serve.enabled: there is nothing to serve; give a pipeline that generates, such as `type: ple`"
            )
        if resolve_engine(config.fleet.engine) != "vllm":
            raise ConfigError(
                f"serve.enabled: it needs vLLM, and `fleet.engine: {config.fleet.engine}` gives none here"
            )
        self._config, self._keys = config, check_settings(config.serve)
        self._place: Place | None = None

    def start(self, run: LiveRun) -> None:
        """On the run's own generators, or on engines of its own."""
        settings, generator = self._config.serve, self._config.fleet.generator
        replica = self._replica(run) if settings.placement == "replicas" else None
        served = Served(run_dir=run.run_dir, live=run.policies, store=run.store, replica=replica)
        cpus, gpus = planned(generator.cpus), planned(generator.gpus)
        self._place = start_endpoint(settings, served, self._keys, run.run_dir, cpus, gpus)

    async def ready(self) -> str:
        """See `wait_for_endpoint`."""
        assert self._place is not None
        return await wait_for_endpoint(self._place)

    def stop(self) -> str | None:
        """See `stop_endpoint`."""
        if self._place is None:
            return None
        stop_endpoint(self._place)
        return self._place.url

    def _replica(self, run: LiveRun) -> ReplicaSpec:
        config = self._config
        engine = engine_spec(
            config,
            run.model_path,
            run.dtype,
            run.device,
            versions=1 + config.serve.pinned,
            seats=config.fleet.generator.max_num_seqs,
            chat_template=run.chat_template,
        )
        return ReplicaSpec(
            engine=engine,
            probe=tuple(run.probe),
            tolerance=run.tolerance,
            run_dir=run.run_dir,
            store_name=run.store_name,
        )
