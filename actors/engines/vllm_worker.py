"""What vLLM's own workers do for `actors.engines.vllm`: mixed into their class, so it runs where the weights are."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from plumbline.models.digest import digest, pair_digest
from plumbline.models.ipc import open_shared
from plumbline.records import SharedWeights


class ReadsBack:
    """A `worker_extension_cls`. vLLM calls its methods by name. Its attributes begin with `plumbline_`: they are mixed
    with those of vLLM's class."""

    plumbline_arrived: dict[str, str]

    def replace_weights(self: Any, path: str, shared: dict[str, Any] | None) -> bool:
        """Load all weights in place. Returns whether they were read in `shared` memory, not in a model's directory.

        On CPUs vLLM multiplies by packed copies of weights, and packs anew only the layers whose weights the files
        name. An output embedding that is tied to the input's is not named: it would go on with its old copy.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        runner = self.model_runner
        runner.model_config.model, runner.model_config.revision = path, None
        there = open_shared(SharedWeights(**shared), self.device) if shared else None
        self.reload_weights(weights_iterator=self.plumbline_noted(there or self.plumbline_files()))
        for layer in runner.get_model().modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(layer)
        return there is not None

    def plumbline_files(self: Any) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the model's directory."""
        from vllm.model_executor.model_loader import get_model_loader

        runner = self.model_runner
        loader: Any = get_model_loader(runner.load_config)
        return loader.get_all_weights(runner.model_config, runner.get_model())

    def plumbline_noted(self: Any, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each is noted by its digest, for those that are then kept in another form."""
        self.plumbline_arrived = {}
        for name, tensor in weights:
            if tensor.is_floating_point():
                self.plumbline_arrived[name] = digest(tensor.to(self.model_runner.model_config.dtype))
            yield name, tensor

    def adapter_digests(self: Any, lora_id: int, names: list[str]) -> dict[str, str | None]:
        """See `actors.engines.seam.Engine.digests`: of the slot that an adapter answers from."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        manager = self.model_runner.lora_manager._adapter_manager
        if lora_id not in manager.lora_index_to_id:
            return {}
        slot, adapter = manager.lora_index_to_id.index(lora_id), manager.get_adapter(lora_id)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        mapper = mapper and mapper.get_rename_mapper()
        ours = {}
        for name in names:
            own, _ = parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)
            ours[own] = name
        held: dict[str, str | None] = {}
        for module_name, layer in manager.modules.items():
            parts = manager.packed_modules.get(module_name, [module_name])
            lora = manager._get_lora_layer_weights(adapter, module_name)
            for part, value in zip(parts, slot_digests(layer, slot, lora, len(parts)), strict=True):
                if value is None or value.strip("0"):
                    held[str(ours.get(part, part))] = value
        return held

    def weight_digests(self: Any, names: list[str]) -> dict[str, str | None]:
        """See `actors.engines.seam.Engine.digests`: of a parameter that is kept as it was published, alone or among the
        rows of a larger one; of any other what was read last, where it was read by `replace_weights`."""
        from vllm.model_executor.utils import get_packed_modules_mapping

        model = self.model_runner.get_model()
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        mapper = mapper and mapper.get_rename_mapper()
        packed = {p: (whole, i) for whole, ps in get_packed_modules_mapping(model).items() for i, p in enumerate(ps)}
        arrived = getattr(self, "plumbline_arrived", {})
        held: dict[str, str | None] = {}
        for name in names:
            found = kept_rows(model, (mapper._map_name(name) if mapper else None) or name, packed)
            held[name] = arrived.get(name) if found is None else digest(found)
        return held


def slot_digests(layer: Any, slot: int, lora: Any, parts: int) -> list[str | None]:
    """Digests of the `parts` modules that a layer has packed, as its slot holds them.

    Where several workers share a layer, each has a piece: a whole one is told where the piece is what the layer's own
    cut of it says, else the piece's, which is nobody's.
    """
    slots = [(a[slot, 0], b[slot, 0]) for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)]
    if len(slots) != parts:  # it splits a module over several slots
        return [None] * parts
    if layer.tp_size == 1 or lora is None:
        return [pair_digest(a, b) for a, b in slots]
    whole_a, whole_b = ([one] if isinstance(one, Tensor) else one for one in (lora.lora_a, lora.lora_b))
    cut_a, cut_b = layer.slice_lora_a(lora.lora_a), layer.slice_lora_b(lora.lora_b)
    cut_a, cut_b = ([one] if isinstance(one, Tensor) else one for one in (cut_a, cut_b))
    return [
        pair_digest(whole_a[i], whole_b[i])
        if whole_a[i] is not None and _lies_in(a, cut_a[i]) and _lies_in(b, cut_b[i])
        else pair_digest(a, b)
        for i, (a, b) in enumerate(slots)
    ]


def _lies_in(slot: Tensor, piece: Tensor) -> bool:
    """Whether a slot holds a piece, and nothing else."""
    padded = torch.zeros_like(slot)
    padded[: piece.shape[0], : piece.shape[1]] = piece
    return torch.equal(slot, padded)


def kept_rows(model: Any, name: str, packed: dict[str, tuple[str, int]]) -> Tensor | None:
    """The rows of a parameter that a published tensor lies in whole; None where there are none such."""
    module_name, _, kind = name.rpartition(".")
    parent, _, last = module_name.rpartition(".")
    whole, index = packed.get(last, (last, 0))
    try:
        layer = model.get_submodule(f"{parent}.{whole}" if parent else whole)
    except AttributeError:
        return None
    parameter = getattr(layer, kind, None)
    if not isinstance(parameter, Tensor) or parameter.numel() == 0 or getattr(layer, "tp_size", 1) > 1:
        return None
    if whole == last:
        return parameter
    sizes = getattr(layer, "output_partition_sizes", None)
    if sizes is None or sum(sizes) != parameter.shape[0]:
        return None
    return parameter.split(sizes)[index]
