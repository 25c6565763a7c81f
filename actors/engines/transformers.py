"""Plain transformers behind the engine seam: for machines without a vLLM wheel, and the oracle of the parity tests.

One request at a time, its `n` samples as one batch over a KV cache. Slow, and simple enough to be believed.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

from actors.engines.seam import Adapter, EngineKind, EngineSpec
from actors.engines.tokens import EngineTokens
from plumbline.errors import RunError
from plumbline.models.backend import set_up_torch
from plumbline.models.digest import digest, lora_scalings, pair_digest
from plumbline.models.loading import load_whole
from plumbline.records import Completion, Head, Sampling, SharedWeights, UserRequest


class TransformersEngine:
    """One model on this process's device; calls queue up behind one lock."""

    kind: EngineKind = "transformers"

    def __init__(self, spec: EngineSpec) -> None:
        set_up_torch(spec.threads)
        self._spec = spec
        self._base = self._read(spec.model_path)
        self._model: PeftModel | None = None
        self._tokens = EngineTokens(spec)
        self._max_len = spec.max_model_len
        self._lock = asyncio.Lock()

    def _read(self, path: str) -> Any:
        model = load_whole(AutoModelForCausalLM, path, self._spec.dtype)
        return model.to(self._spec.device).eval()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, n: int, adapter: Adapter | None
    ) -> list[Completion]:
        async with self._lock:
            return await asyncio.to_thread(self._generate, list(prompt_ids), sampling, seed, n, adapter)

    async def logprobs(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], *, adapter: Adapter | None
    ) -> list[float]:
        async with self._lock:
            return await asyncio.to_thread(self._logprobs, list(prompt_ids), list(response_ids), adapter)

    def answer(self, request: UserRequest, *, adapter: Adapter | None) -> AsyncIterator[Head | str]:
        raise RunError("serving users needs vLLM: `fleet.engine: vllm`, or auto where it is installed")

    async def add_adapter(self, adapter: Adapter) -> None:
        async with self._lock:
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._base, adapter.path, adapter_name=str(adapter.id))
                self._model.eval()
            else:
                self._model.load_adapter(adapter.path, adapter_name=str(adapter.id))

    async def remove_adapter(self, adapter: Adapter) -> None:
        async with self._lock:
            # PEFT keeps its last adapter: a model without any is no PEFT model.
            if self._model is not None and len(self._model.peft_config) > 1:
                self._model.delete_adapter(str(adapter.id))

    async def load_weights(self, path: str, shared: SharedWeights | None = None) -> bool:
        async with self._lock:
            self._base = await asyncio.to_thread(self._read, path)  # read as at the start: ties are the model's own
        return False

    async def digests(self, names: Sequence[str], *, adapter: Adapter | None) -> list[dict[str, str | None]]:
        async with self._lock:
            if adapter is None:
                weights = dict(self._base.named_parameters())
                return [{name: digest(weights[name]) for name in names if name in weights}]
            assert self._model is not None
            name, held = str(adapter.id), {}
            for module, scaling in lora_scalings(self._model, name).items():
                layer: Any = self._base.get_submodule(module)  # PEFT puts its layers into the model that it wraps
                held[module] = pair_digest(layer.lora_A[name].weight, layer.lora_B[name].weight * scaling)
            return [held]

    async def check_health(self) -> None:
        """It lives in this process."""

    async def close(self) -> None:
        self._model = None

    @contextmanager
    def _using(self, adapter: Adapter | None) -> Iterator[torch.nn.Module]:
        if self._model is None:
            assert adapter is None
            yield self._base
        elif adapter is None:
            with self._model.disable_adapter():
                yield self._model
        else:
            self._model.set_adapter(str(adapter.id))
            yield self._model

    @torch.inference_mode()
    def _generate(
        self, prompt_ids: list[int], sampling: Sampling, seed: int, n: int, adapter: Adapter | None
    ) -> list[Completion]:
        device = self._base.device
        draws = [torch.Generator().manual_seed(seed + i) for i in range(n)]
        responses: list[list[int]] = [[] for _ in range(n)]
        done: set[int] = set()  # samples that ended by themselves
        ids = torch.tensor([prompt_ids] * n, device=device)
        cache = DynamicCache(config=self._base.config)
        limit = min(sampling.max_tokens, self._max_len - len(prompt_ids))
        with self._using(adapter) as model:
            for _ in range(limit):
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                picked = [
                    self._draw(row, sampling, draw) for row, draw in zip(logits.float().cpu(), draws, strict=True)
                ]
                for i, token in enumerate(picked):
                    if i not in done:
                        responses[i].append(token)
                        if self._tokens.ends(responses[i], sampling.stop):
                            done.add(i)
                if len(done) == n:
                    break
                ids = torch.tensor([[token] for token in picked], device=device)
        return [
            self._tokens.completion(response, sampling.stop, stopped=i in done) for i, response in enumerate(responses)
        ]

    @torch.inference_mode()
    def _logprobs(self, prompt_ids: list[int], response_ids: list[int], adapter: Adapter | None) -> list[float]:
        ids = torch.tensor([prompt_ids + response_ids], device=self._base.device)
        with self._using(adapter) as model:
            logits = model(input_ids=ids, logits_to_keep=len(response_ids) + 1).logits[0, :-1]
        logps = logits.float().log_softmax(-1)
        return logps.gather(1, ids[0, len(prompt_ids) :, None])[:, 0].tolist()

    def _draw(self, logits: torch.Tensor, sampling: Sampling, draw: torch.Generator) -> int:
        if sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits / sampling.temperature).softmax(-1)
        if sampling.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered)
        return int(torch.multinomial(probabilities, 1, generator=draw))
