"""vLLM's `AsyncLLM` behind the engine seam: continuous batching, prefix cache, base and adapters in one batch."""

import asyncio
import importlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.engines.seam import Adapter, EngineKind, EngineSpec
from actors.engines.tokens import EngineTokens
from actors.engines.vllm_batches import Batches
from actors.engines.vllm_openai import OpenAIAnswers
from plumbline.errors import ConfigError, RunError
from plumbline.records import Completion, Head, Sampling, SharedWeights, UserRequest

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can be started for; an adapter's may be smaller."""
CACHE_TRIES = 50
READS_BACK = "actors.engines.vllm_worker.ReadsBack"
LEAVES_BASE = "actors.engines.vllm_lora.LeavesBase"
ON_GPU = "actors.engines.vllm_gpu.OnGpu"
GRAPH_LIMIT = 512
"""Tokens of the largest CUDA graph, as vLLM has it: beyond, launching kernels no longer counts."""
CHOOSES_GRAPHS = {
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "compilation_config",
    "enforce_eager",
    "optimization_level",
    "performance_mode",
}
"""Arguments by which a config has said itself which graphs it wants."""


def import_vllm(spec: EngineSpec) -> None:
    """The slow part of a start that needs no model yet. What vLLM reads of the environment is set before."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Else it sets up logging as if the process were its own, and closes the handlers of others: Ray Serve takes a
    # replica that cannot log for a broken one.
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if spec.device == "cpu":
        # One worker inside the engine's own process: two processes instead of three.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    importlib.import_module("vllm.v1.engine.async_llm")


class VllmEngine:
    """One vLLM engine on this process's devices."""

    kind: EngineKind = "vllm"

    def __init__(self, spec: EngineSpec) -> None:
        import_vllm(spec)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._tokens = EngineTokens(spec)
        self._tokenizer_home = tempfile.TemporaryDirectory(prefix="plumbline-tokenizer-")
        self._tokens.write(Path(self._tokenizer_home.name))
        ours: dict[str, Any] = {"tokenizer": self._tokenizer_home.name, "generation_config": self._tokenizer_home.name}
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(spec), **ours))
        self._batches = Batches(self._llm) if spec.deterministic else None
        self._ids = itertools.count()
        self._rollouts_priority = 1 if spec.seats else 0  # users, and proofs, go first with 0
        self._users = OpenAIAnswers(self._llm, spec.model_path, self._tokens, spec.seats) if spec.seats else None

    def _lora(self, adapter: Adapter | None):
        from vllm.lora.request import LoRARequest

        return adapter and LoRARequest(adapter.name, adapter.id, adapter.path)

    async def _final(self, prompt_ids: Sequence[int], params, adapter: Adapter | None, priority: int = 0):
        from vllm import TokensPrompt

        request: dict[str, Any] = {
            "prompt": TokensPrompt(prompt_token_ids=list(prompt_ids)),
            "request_id": str(next(self._ids)),
            "lora_request": self._lora(adapter),
            "priority": priority,
        }
        last = None
        if self._batches:
            last = await self._batches.final(params=params, **request)
        else:
            async for output in self._llm.generate(sampling_params=params, **request):
                last = output
        assert last is not None and last.finished
        return last

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, n: int, adapter: Adapter | None
    ) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=n,
            seed=seed,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(sampling.stop),
            detokenize=bool(sampling.stop),  # only to see where a stop string begins
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._final(prompt_ids, params, adapter, self._rollouts_priority)
        return [
            self._tokens.completion(one.token_ids, sampling.stop, stopped=one.finish_reason == "stop")
            for one in sorted(output.outputs, key=lambda one: one.index)
        ]

    async def logprobs(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], *, adapter: Adapter | None
    ) -> list[float]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids = [*prompt_ids, *response_ids]
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        output = await self._final(ids, params, adapter)
        scored: Any = output.prompt_logprobs
        return [scored[i][ids[i]].logprob for i in range(len(prompt_ids), len(ids))]

    def answer(self, request: UserRequest, *, adapter: Adapter | None) -> AsyncIterator[Head | str]:
        if self._users is None:
            raise RunError("this engine was started without seats for users")
        return self._users.answer(request, self._lora(adapter))

    async def add_adapter(self, adapter: Adapter) -> None:
        lora: Any = self._lora(adapter)
        await self._llm.add_lora(lora)

    async def remove_adapter(self, adapter: Adapter) -> None:
        await self._llm.remove_lora(adapter.id)
        if self._users is not None:
            self._users.forget(adapter.name)

    async def load_weights(self, path: str, shared: SharedWeights | None = None) -> bool:
        """Into vLLM's workers, on CPUs and GPUs alike; what was cached of old weights is dropped. See `Engine`.

        Raises:
            RunError: a request was under way.
        """
        arguments = (path, asdict(shared) if shared else None)
        there: list[bool] = await self._llm.collective_rpc("replace_weights", args=arguments)
        for _ in range(CACHE_TRIES):
            if await self._llm.reset_prefix_cache():
                return any(there)
            await asyncio.sleep(0.1)  # blocks of the last request are still being freed
        raise RunError("vLLM did not drop its prefix cache after its weights were replaced: a request was under way")

    async def digests(self, names: Sequence[str], *, adapter: Adapter | None) -> list[dict[str, str | None]]:
        if adapter is None:
            return await self._llm.collective_rpc("weight_digests", args=(list(names),))
        return await self._llm.collective_rpc("adapter_digests", args=(adapter.id, list(names)))

    async def check_health(self) -> None:
        if self._llm.errored:
            raise RuntimeError("vLLM's engine is dead")

    async def close(self) -> None:
        self._llm.shutdown()
        self._tokenizer_home.cleanup()


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """The keywords of vLLM's `AsyncEngineArgs`; those that a config adds (`spec.vllm`) replace ours where they may.

    Raises:
        ConfigError: one of them is not the config's to choose on this device.
    """
    ours: dict[str, Any] = {"load_format": "safetensors", "enforce_eager": spec.device == "cpu"}
    fixed: dict[str, Any] = {
        "model": spec.model_path,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.decoded,
        "disable_log_stats": True,
        "trust_remote_code": False,
    }
    if spec.device == "cpu":
        # A per-request seed crashes the CPU backend as soon as a prefill is chunked ("CPU Generator does not use
        # offset"). So none is, and a batch takes the longest prompt whole.
        fixed |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(spec.max_model_len, 8192),
            "kv_cache_memory_bytes": int(spec.kv_cache_gib * 2**30),
        }
    else:
        fixed["gpu_memory_utilization"] = spec.memory_share
        ours["cudagraph_capture_sizes"] = graph_sizes(spec.decoded)
    if spec.tensor_parallel > 1:
        # Ray gave this actor all of the engine's GPUs: its workers are processes of ours, not actors to be placed anew.
        fixed |= {"tensor_parallel_size": spec.tensor_parallel, "distributed_executor_backend": "mp"}
    if spec.seats:
        fixed["scheduling_policy"] = "priority"
    if spec.deterministic:
        # What is in the cache, and what was scheduled before an answer was known to have ended, depends on timing.
        fixed |= {"enable_prefix_caching": False, "async_scheduling": False}
    on_cpu = LEAVES_BASE if spec.max_adapters else READS_BACK
    fixed["worker_extension_cls"] = on_cpu if spec.device == "cpu" else ON_GPU
    if spec.max_adapters:
        fixed |= adapter_settings(spec)
    if taken := sorted(fixed.keys() & spec.vllm.keys()):
        raise ConfigError(f"`{taken[0]}` is Plumbline's to choose on a {spec.device}; leave it out")
    if spec.vllm.keys() & CHOOSES_GRAPHS:
        ours.pop("cudagraph_capture_sizes", None)
    return {**ours, **spec.vllm, **fixed}


def graph_sizes(decoded: int) -> list[int]:
    """Batches, in tokens, that CUDA graphs are captured for: two an octave, up to all that is decoded at once and as
    many tokens of prompts beside it.

    vLLM's own choice is every multiple of 8, then of 16: 51 sizes where 256 are decoded at once, and these are 18. It
    captures each up to four times: for mixed batches and for decoding alone, with adapters and without. Both pairs
    stay: pools mix prompts into most batches, and its runner does the second whatever `cudagraph_specialize_lora` says.
    A batch in between is filled up with rows of nothing, at most half as many again.
    """
    most = min(2 * decoded, GRAPH_LIMIT)
    steps = {step for power in range(most.bit_length()) for step in (2**power, 3 * 2**power)}
    return sorted(step for step in {*steps, min(decoded, most), most} if step <= most)


def adapter_settings(spec: EngineSpec) -> dict[str, Any]:
    """vLLM's arguments for adapters beside the base."""
    from plumbline.models.adapters import linear_names

    return {
        "enable_lora": True,
        "max_loras": spec.max_adapters,
        "max_cpu_loras": spec.max_adapters,
        "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= spec.max_lora_rank),
        # Without this vLLM prepares the LM head for adapters too, which PEFT's "all-linear" leaves out; on CPUs
        # its prompt log-probs then crash.
        "lora_target_modules": list(spec.lora_targets or linear_names(spec.model_path)),
    }
