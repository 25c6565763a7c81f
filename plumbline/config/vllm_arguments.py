"""What `fleet.generator.vllm` may not say: arguments that Plumbline gives vLLM itself, and those that would run code.

All other names and values are vLLM's own to judge (`actors.engines.check`), which this wing never imports.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from plumbline.config.section import Json

_ADAPTERS = "the policies of the run decide on its adapters: `pipelines[].policy`"
_GPUS = "an engine's model is cut over its GPUs: `fleet.generator.gpus`"
_COPIES = "more engines are `fleet.generator.replicas`"
_CODE = "Plumbline runs vLLM's own code alone"

SET_BY_US: Mapping[str, str] = {
    "model": "the run's model is served: `model.path`",
    "model_weights": "the run's model is served: `model.path`",
    "tokenizer": "it is the model's: `model.tokenizer`",
    "tokenizer_mode": "all of a run read texts in one way: `model.tokenizer`",
    "tokenizer_revision": "it is the model's: `model.tokenizer`",
    "skip_tokenizer_init": "it is the model's: `model.tokenizer`",
    "generation_config": "what ends an answer stands in the model's generation_config.json: `model.path`",
    "served_model_name": "names come from the run's pipelines",
    "dtype": "learner and engine compute in the same: `model.dtype`",
    "seed": "all draws follow from `seed`",
    "runner": "a generator generates",
    "convert": "a generator generates",
    "max_model_len": "give `model.max_len`",
    "max_num_seqs": "give `fleet.generator.max_num_seqs`",
    "gpu_memory_utilization": "give `fleet.generator.memory_share`",
    "kv_cache_memory_bytes": "give `fleet.generator.memory_share`, or `kv_cache_gib` on CPUs",
    "scheduling_policy": "users go before rollouts where they share an engine: `serve.placement`",
    "logprobs_mode": "versions are proved on raw log-probs",
    "disable_log_stats": "figures of a run are `plumbline report`'s and the exported metrics",
    "enable_lora": _ADAPTERS,
    "max_loras": _ADAPTERS,
    "max_cpu_loras": _ADAPTERS,
    "max_lora_rank": "give `r` of a pipeline's `policy`",
    "lora_target_modules": _ADAPTERS,
    "lora_dtype": _ADAPTERS,
    "default_mm_loras": _ADAPTERS,
    "tensor_parallel_size": _GPUS,
    "pipeline_parallel_size": _GPUS,
    "prefill_context_parallel_size": _GPUS,
    "distributed_executor_backend": _GPUS,
    "device_ids": _GPUS,
    "nnodes": _GPUS,
    "node_rank": _GPUS,
    "data_parallel_size": _COPIES,
    "worker_cls": _CODE,
    "worker_extension_cls": _CODE,
    "scheduler_cls": _CODE,
    "logits_processors": _CODE,
    "model_class_overrides": _CODE,
    "io_processor_plugin": _CODE,
    "reasoning_parser_plugin": _CODE,
}
"""Arguments of vLLM that the key may not name, and what to do instead."""

FORMATS = (
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "runai_streamer_sharded",
    "sharded_state",
)
"""Loaders of vLLM that read safetensors and nothing else."""


def _allowed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError, naming the argument."""
    for name, instead in SET_BY_US.items():
        if name in arguments:
            raise ValueError(f"`{name}` is not for this key: {instead}")
    for name, value in _all(arguments):
        if name == "trust_remote_code":
            raise ValueError(
                "`trust_remote_code` would run a model's own code, which Plumbline never does; leave it out"
            )
        if name == "load_format" and value not in FORMATS:
            raise ValueError(f"`load_format: {value}` does not read safetensors alone; known are {', '.join(FORMATS)}")
    return arguments


def _all(arguments: Any) -> Iterator[tuple[str, Any]]:
    """Names and values at every depth: arguments such as `speculative_config` hold others."""
    if isinstance(arguments, Mapping):
        for name, value in arguments.items():
            yield name, value
            yield from _all(value)
    elif isinstance(arguments, Sequence) and not isinstance(arguments, str):
        for one in arguments:
            yield from _all(one)


VllmArguments = Annotated[
    Json,
    AfterValidator(_allowed),
    Field(description="more engine arguments of vLLM by their names, such as {kv_cache_dtype: fp8}"),
]
