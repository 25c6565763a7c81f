"""DeepSpeed's ZeRO 1, 2 and 3 behind the strategy seam. Imported only where a config says ``strategy: deepspeed``.

ZeRO cuts what the optimiser holds (1), gradients too (2), and weights too (3) over the workers. The optimiser is
torch's own, on float32 copies of what is trained: updates are those of `TorchStrategy`, and nothing is compiled.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.learning.objectives import Loss
from actors.learning.policy import LearnedPolicy
from actors.learning.strategy import Portion, Result, Update, backward_passes, make_optimizer, optimizer_keys
from plumbline.config.learner import Learner
from plumbline.errors import ModelError
from plumbline.models.classifier import packs_texts
from plumbline.models.group_logps import supports_shared_prefix
from plumbline.runs.checkpoint import Checkpoint, Piece, whole

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


class ZeroCut:
    """Cuts weights as ZeRO 3 will have them. A `plumbline.models.loading.Cut`."""

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        self._api = import_deepspeed(device)
        self._first: Any = None

    def __call__(self, weight: nn.Parameter) -> None:
        if self._first is not None:
            self._first.convert_to_zero_parameters([weight])
            return
        self._api.zero.Init(module=nn.ParameterList([weight]), dtype=weight.dtype)
        self._first = weight

    def same(self, one: Any, other: Any) -> bool:
        if one.ds_shape != other.ds_shape:
            return False
        same = torch.tensor(int(torch.equal(one.ds_tensor, other.ds_tensor)), device=one.ds_tensor.device)
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        return bool(same)


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
        deepspeed = import_deepspeed(device)
        self._api = deepspeed
        self._world = world
        self._named = dict(policy.named_trainable())
        # The plain loop leaves the precision of weights to the optimiser; here float32 copies are kept.
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=Body(policy.model),
            optimizer=make_optimizer(settings, list(self._named.values())),
            config=engine_config(settings, dtype, sum(map(size_of, policy.model.parameters()))),
            dist_init_required=False,
        )
        self._model = policy.model
        for buffer in self._model.buffers():  # DeepSpeed leaves them where they are, beside weights that came cut
            buffer.data = buffer.data.to(self._engine.device)
        if policy.generates:  # asked now: an update has a number of forward passes that all workers know
            (supported,) = self.forward(lambda model: [supports_shared_prefix(model)])
            if zero_stage(settings) == 3 and not supported:
                name = type(policy.model).__name__
                raise ModelError(f"{name} has no shared-prefix forward, which `zero: 3` needs; write `zero: 2`")
        else:
            self.forward(lambda model: [packs_texts(model)])

    def update(self, objective: Loss, portion: Portion, lr: float) -> Update:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        results: list[Result] = []
        works = backward_passes(objective, portion, self.forward, results)
        for i, work in enumerate(works):
            self._engine.set_gradient_accumulation_boundary(i + 1 == len(works))
            # DeepSpeed averages gradients over workers.
            self._engine.backward(self._engine(work) * self._world)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return Update(grad_norm=norm if norm >= 0 else float("nan"), results=results)

    def forward(self, work: Callable[[Any], T]) -> T:
        with torch.no_grad():
            return self._engine.module(work)  # past the engine, which prepares for a backward pass

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items() if trainable else self._model.named_parameters():
            with self._api.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                weight = parameter.detach().cpu().clone()
            yield name, weight

    def held(self) -> Mapping[str, Tensor]:
        return {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in self._named.items()}

    def state(self) -> dict[str, Piece]:
        flat, of_flat = next(iter(self._states().items()), (None, {}))
        pieces = {}
        for i, (name, parameter) in enumerate(self._named.items()):
            start, count = self._held(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if count:
                values = self._get(parameter, None)[:count].cpu()
                pieces[f"model.{name}"] = Piece(values=values, start=start, shape=shape)
            for key, value in of_flat.items():
                if flat is None or value.shape != flat.shape:  # one number for all, as a count of steps
                    if self._engine.global_rank == 0:
                        pieces[f"optimizer.{i}.{key}"] = whole(value.cpu().clone())
                elif count:
                    values = self._get(parameter, key)[:count].cpu()
                    pieces[f"optimizer.{i}.{key}"] = Piece(values=values, start=start, shape=shape)
        return pieces

    def load(self, saved: Checkpoint) -> None:
        shapes = saved.shapes()
        keys = optimizer_keys(shapes)
        if keys:
            i = min(keys)
            numbers = [key for key in keys[i] if not shapes[f"optimizer.{i}.{key}"]]
            self._make_states(keys[i], {key: saved.whole(f"optimizer.{i}.{key}") for key in numbers})
        for i, (name, parameter) in enumerate(self._named.items()):
            self._set(parameter, saved, f"model.{name}", None)
            for key in keys.get(i, []):
                if shapes[f"optimizer.{i}.{key}"]:
                    self._set(parameter, saved, f"optimizer.{i}.{key}", key)
        self._copy_to_model()

    def _states(self) -> dict[Tensor, dict[str, Tensor]]:
        """The optimiser's state of each flat piece that this worker holds; empty before the first update."""
        return self._optimizer.optimizer.state

    def _make_states(self, keys: Sequence[str], numbers: Mapping[str, Tensor]) -> None:
        """What the first update would make, of zeros: then it can be set. `numbers`: the states that are one number."""
        optimizer = self._optimizer
        kinds = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        flats = next(getattr(optimizer, kind) for kind in kinds if hasattr(optimizer, kind))  # of ZeRO 3, 2, 1 in bf16
        for flat in flats:
            self._states()[flat] = {
                key: numbers[key].clone() if key in numbers else torch.zeros_like(flat) for key in keys
            }
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # not ZeRO 3
            optimizer._lazy_init_hp_params_optimizer_state()

    def _held(self, parameter: Any) -> tuple[int, int]:
        """Which of a parameter's numbers this worker's optimiser holds: from where on, and how many."""
        if hasattr(parameter, "ds_id"):  # all have pieces of one size, and the last is filled up
            size = parameter.ds_tensor.numel()
            start = size * self._engine.global_rank
            return start, max(0, min(size, parameter.ds_numel - start))
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.numel

    def _get(self, parameter: Any, key: str | None) -> Tensor:
        """What the optimiser holds of a parameter: a state, or the float32 copy itself."""
        utils = self._api.utils
        if not hasattr(parameter, "ds_id"):
            return parameter._hp_mapping.get_hp_fragment(key)
        if key is None:
            return utils.safe_get_local_fp32_param(parameter)
        return utils.safe_get_local_optimizer_state(parameter, key)

    def _set(self, parameter: Any, saved: Checkpoint, name: str, key: str | None) -> None:
        """Read that from a checkpoint."""
        utils = self._api.utils
        start, count = self._held(parameter)
        value = saved.read(name, start, count).to(self._engine.device, torch.float32) if count else torch.empty(0)
        if not hasattr(parameter, "ds_id"):
            if count:
                parameter._hp_mapping.get_hp_fragment(key).data.copy_(value)
            return
        value = nn.functional.pad(value, (0, parameter.ds_tensor.numel() - count)).to(self._engine.device)
        if key is None:
            utils.safe_set_local_fp32_param(parameter, value)
        else:
            utils.safe_set_local_optimizer_state(parameter, value, key)

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


def size_of(weight: Any) -> int:
    """Numbers in a weight, also in one that was cut."""
    return getattr(weight, "ds_numel", weight.numel())


def zero_stage(settings: Learner) -> int:
    """1, 2 or 3."""
    return settings.zero or 2


def engine_config(settings: Learner, dtype: Literal["float32", "bfloat16"], parameters: int) -> dict[str, Any]:
    """DeepSpeed's own config. `parameters`: numbers in the model."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # of its own counters; what a micro-batch is, the worker says
        "gradient_clipping": settings.clip_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Sums of gradients, over micro-batches and over workers; of many small ones nothing would be left in bfloat16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
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
