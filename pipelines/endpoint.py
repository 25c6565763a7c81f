"""A live run's endpoint: users ask the policies while they are being trained."""

from dataclasses import replace

from actors.engine import engine_spec, resolve_engine
from pipelines.context import Context
from plumbline.config import Config
from plumbline.errors import ConfigError
from plumbline.records import public_name
from serve.keys import Keys
from serve.launch import Served, check_settings, start_endpoint, wait_for_endpoint
from serve.replica import ReplicaSpec


def check_endpoint(config: Config) -> Keys:
    """The API keys of a run's endpoint; none where it has no endpoint. Raises ConfigError where it cannot be served."""
    if not config.serve.enabled:
        return Keys()
    if not config.rolling:
        raise ConfigError(
            "serve.enabled: there is nothing to serve; give a pipeline that generates, such as `type: ple`"
        )
    if resolve_engine(config.fleet.engine) != "vllm":
        raise ConfigError(f"serve.enabled: it needs vLLM, and `fleet.engine: {config.fleet.engine}` gives none here")
    return check_settings(config.serve)


def begin_endpoint(context: Context, keys: Keys) -> None:
    """Start it; engines load meanwhile. Aliases mean π0 until a version of theirs is promoted."""
    config = context.config
    served = Served(run_dir=context.run_dir, live=tuple(p.name for p in config.served), store=context.fleet.store)
    generator = config.fleet.generator
    if config.serve.placement == "replicas":
        spec = engine_spec(
            config,
            context.model_path,
            context.dtype,
            context.device,
            versions=1 + config.serve.pinned,
            seats=generator.max_num_seqs,
            chat_template=context.tokenizer.chat_template,
        )
        replica = ReplicaSpec(
            engine=spec,
            probe=context.probe,
            tolerance=context.tolerance,
            run_dir=context.run_dir,
            store_name=context.fleet.store_name,
        )
        served = replace(served, replica=replica)
    context.events.say("starting the endpoint")
    start_endpoint(config.serve, served, keys, generator.cpus, generator.gpus)


async def await_endpoint(context: Context) -> None:
    """Wait until it answers, and say where. Raises RunError."""
    url = await wait_for_endpoint(context.config.serve)
    names = ", ".join(["base", *(public_name(p.name) for p in context.config.served)])
    context.events.say(f"serving {names} on {url}/v1")
