"""DeepSpeed's ZeRO 1, 2 and 3 behind the strategy seam. Imported only where a config says ``strategy: deepspeed``.

ZeRO cuts what the optimiser holds (1), gradients too (2), and weights too (3) over the workers. The optimiser is
torch's own, on float32 copies of what is trained: updates are those of `TorchStrategy`, and nothing is compiled.
"""

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from actors.learning.policy import LearnedPolicy
from actors.learning.strategy import Loss, MicroBatch, Update, make_optimizer, optimizer_state
from plumbline.config.learner import Learner
from plumbline.errors import ModelError
from plumbline.models.classifier import packs_texts
from plumbline.models.group_logps import supports_shared_prefix

T = TypeVar("T")
BUCKET = 2**26
"""Numbers that one collective moves, at most."""


class Body(nn.Module):
    """What DeepSpeed wraps: its hooks must see the call that a loss is computed in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[Any], T]) -> T:
        return work(self.model)


class DeepspeedStrategy:
    """One DeepSpeed engine.

    Raises:
        ModelError: ZeRO 3 with a model whose number of forward passes depends on the batch.
    """

    def __init__(
        self,
        policy: LearnedPolicy,
        settings: Learner,
        dtype: Literal["float32", "bfloat16"],
        device: Literal["cpu", "cuda"],
        world: int,
    ) -> None:
        # Asked now: it takes forward passes of its own, which cut weights would not survive.
        if policy.generates and not supports_shared_prefix(policy.model) and zero_stage(settings) == 3:
            raise ModelError(
                f"{type(policy.model).__name__} has no shared-prefix forward, which `zero: 3` needs; write `zero: 2`"
            )
        if not policy.generates:
            packs_texts(policy.model)
        deepspeed = import_deepspeed(device)
        self._api = deepspeed
        self._world = world
        self._named = dict(policy.named_trainable())
        # The plain loop leaves the precision of weights to the optimiser; here float32 copies are kept.
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=Body(policy.model),
            optimizer=make_optimizer(settings, list(self._named.values())),
            config=engine_config(settings, dtype, sum(p.numel() for p in policy.model.parameters())),
            dist_init_required=False,
        )
        self._model = policy.model

    def update(self, loss: Loss, micro_batches: Sequence[MicroBatch], lr: float) -> Update:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        results = []
        for i, micro in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            value, metrics = self._engine(lambda model, micro=micro: loss(model, micro.samples))
            # DeepSpeed averages gradients over workers.
            self._engine.backward(value * (micro.share * self._world))
            results.append((value.detach(), metrics))
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return Update(grad_norm=norm if norm >= 0 else float("nan"), results=results)

    def forward(self, work: Callable[[Any], T]) -> T:
        with torch.no_grad():
            return self._engine.module(work)  # past the engine, which prepares for a backward pass

    def weights(self, *, trainable: bool) -> dict[str, Tensor]:
        named = self._named if trainable else dict(self._model.named_parameters())
        return {name: self._whole(parameter) for name, parameter in named.items()}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        with self._api.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().cpu().clone()

    def state(self) -> dict[str, Tensor]:
        utils = self._api.utils
        kept = self._states()
        flat, of_flat = next(iter(kept.items()), (None, {}))
        tensors = {}
        for i, (name, parameter) in enumerate(self._named.items()):
            tensors[f"model.{name}"] = utils.safe_get_full_fp32_param(parameter).cpu()
            for key, value in of_flat.items():
                whole = flat is not None and value.shape == flat.shape
                full = utils.safe_get_full_optimizer_state(parameter, key) if whole else value.detach()
                tensors[f"optimizer.{i}.{key}"] = full.cpu().clone()
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        saved = optimizer_state(tensors)
        if saved:
            self._make_states(next(iter(saved.values())))
        for i, (name, parameter) in enumerate(self._named.items()):
            self._set(parameter, tensors[f"model.{name}"], None)
            for key, value in saved.get(i, {}).items():
                if value.dim():
                    self._set(parameter, value, key)
        self._copy_to_model()

    def _states(self) -> dict[Tensor, dict[str, Tensor]]:
        """The optimiser's state of each flat piece that this worker holds; empty before the first update."""
        return self._optimizer.optimizer.state

    def _make_states(self, example: Mapping[str, Tensor]) -> None:
        """What the first update would make, of zeros: then it can be set."""
        optimizer = self._optimizer
        cut = hasattr(optimizer, "fp32_partitioned_groups_flat")
        for flat in optimizer.fp32_partitioned_groups_flat if cut else optimizer.single_partition_of_fp32_groups:
            self._states()[flat] = {
                key: torch.zeros_like(flat) if value.dim() else value.clone() for key, value in example.items()
            }
        if not cut:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Put this worker's piece of a whole tensor into the optimiser: a state, or the float32 copy itself."""
        utils = self._api.utils
        value = value.to(self._engine.device, torch.float32)
        if hasattr(parameter, "ds_id"):  # the last worker's piece is filled up
            size = parameter.ds_tensor.numel()
            value = nn.functional.pad(value.flatten(), (0, size * self._world - value.numel()))
            value = value.narrow(0, size * self._engine.global_rank, size)
            if key is None:
                utils.safe_set_local_fp32_param(parameter, value)
            else:
                utils.safe_set_local_optimizer_state(parameter, value, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def _copy_to_model(self) -> None:
        """The float32 copies to the weights that the model computes with, on all workers: the end of an update."""
        optimizer = self._optimizer
        if hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
            return
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:  # small ones, which every worker holds whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def import_deepspeed(device: Literal["cpu", "cuda"]) -> Any:
    """DeepSpeed on the given device, without its extension for collectives in shared memory: that would be compiled
    first, for the better part of a minute, where there is a compiler."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    backend: Any = importlib.import_module("deepspeed.comm.torch")  # not by attribute: that is torch itself
    backend.build_shm_op = lambda: None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", dist_init_required=False)
    return deepspeed


def zero_stage(settings: Learner) -> int:
    """1, 2 or 3."""
    return settings.zero or 2


def engine_config(settings: Learner, dtype: Literal["float32", "bfloat16"], parameters: int) -> dict[str, Any]:
    """DeepSpeed's own config. `parameters`: numbers in the model."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # of its own counters; what a micro-batch is, the worker says
        "gradient_clipping": settings.clip_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # RMSprop
        "zero_optimization": {
            "stage": zero_stage(settings),
            "reduce_bucket_size": min(BUCKET, parameters),
            "allgather_bucket_size": min(BUCKET, parameters),
            "stage3_prefetch_bucket_size": min(BUCKET, parameters),
            "stage3_param_persistence_threshold": min(100_000, parameters // 1000),
        },
        "steps_per_print": 2**31,
    }
