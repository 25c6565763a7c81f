"""Models as their files have them, whole: what transformers only reports, random weights in place of missing ones, ends
the run here. Every process that loads a model by transformers calls it.

A worker that holds only its piece of every weight reads a model by the same code of transformers: each weight is cut as
soon as it is there (`Cut`), so that no more than one is ever whole.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import modeling_utils
from transformers.utils import logging

from plumbline.errors import ModelError, in_one_line
from plumbline.models.files import INDEX, WEIGHTS, Stored

NAMED = 3
"""Weights that a message names; of more it says how many."""
SHARD = 5 * 10**9
"""Bytes of a file of weights, at most."""
_THERE = "_is_hf_initialized"
"""Transformers' own mark of a weight that was loaded, and is not to be drawn."""

Heads = Literal["whole", "new", "none"]
"""What of a head a model's files must have: all, as of the body; none, for it is random and to be trained; or they may
have what they like, for the body alone is read."""


class Cut(Protocol):
    """How workers share weights; both calls are collective, in the same order."""

    def __call__(self, weight: nn.Parameter) -> None:
        """Leave of a weight, which all workers hold whole, this worker's piece; in place."""
        ...

    def same(self, one: nn.Parameter, other: nn.Parameter) -> bool:
        """Whether two weights that were cut are equal."""
        ...


def load_whole(
    factory: Any, path: str, dtype: str, *, new_head: bool = False, cut: Cut | None = None, **settings: Any
) -> Any:
    """``factory.from_pretrained`` from safetensors, without remote code, on the CPU.

    Args:
        factory: one of transformers' AutoModel classes.
        dtype: `float32` and the like, or `auto`: what the files have.
        new_head: the head may be another than the files', and random: a classifier to be trained from a causal LM.
        cut: how to cut each weight as soon as it is read; None: the model stays whole.
        settings: of the model's config, such as `num_labels`.

    Raises:
        ModelError: the files cannot be read, lack a weight, have one that the model has not or of another shape, or
            one that is not finite.
    """
    pieces = Pieces(cut) if cut else None
    try:
        with quiet(), pieces.taken() if pieces else contextlib.nullcontext():
            model, report = factory.from_pretrained(
                path,
                dtype=getattr(torch, dtype, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be named below
                **settings,
            )
    except Exception as error:  # of safetensors, of transformers, of the disk: all mean that the files are no model
        raise ModelError(f"model {path}: cannot be loaded ({in_one_line(error)})") from None
    refuse(model, report, f"model {path}", "new" if new_head else "whole")
    if name := pieces.first_not_finite(model) if pieces else first_not_finite(model.named_parameters()):
        raise ModelError(f"model {path}: {name} has values that are no finite numbers; it was damaged, or diverged")
    if pieces:
        pieces.put_into(model)
    return model


def check_names(
    factory: Any, path: str, key: str, stored: Mapping[str, Stored], heads: Heads = "whole", **settings: Any
) -> None:
    """What `load_whole` would say of the weights' names and shapes, by the headers of the files alone: transformers
    loads them without memory. One that is quantised is left to its loader.

    Args:
        key: what names the model, in messages.

    Raises:
        ModelError: as `load_whole`.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **settings)
        if getattr(config, "quantization_config", None) is not None:
            return
        with quiet(), torch.device("meta"):
            weights = {name: torch.empty(one.shape) for name, one in stored.items()}
            model, report = type(factory.from_config(config)).from_pretrained(
                None,
                config=config,
                state_dict=weights,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # see `load_whole`
        raise ModelError(f"{key}: {path}: cannot be loaded ({in_one_line(error)})") from None
    refuse(model, report, f"{key}: {path}", heads)


def refuse(model: Any, report: Mapping[str, Any], called: str, heads: Heads) -> None:
    """Raises ModelError where transformers' report of a model that it loaded says that it is not what its files have.

    Args:
        called: how a message begins.
    """
    prefix = model.base_model_prefix
    body = f"{prefix}." if prefix and getattr(model, prefix, None) is not None else ""

    def counts(name: str) -> bool:
        return name.startswith(body) if heads == "new" else not name.startswith("pooler.") if heads == "none" else True

    for what, names in (
        ("lacks", report["missing_keys"]),
        ("has what its config.json knows nothing of:", () if heads == "none" else report["unexpected_keys"]),
        ("has another shape than its config.json says:", [name for name, *_ in report["mismatched_keys"]]),
    ):
        if wrong := sorted(name for name in names if counts(name)):
            more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            other = next((name for name in report["unexpected_keys"] if name.endswith(f".{wrong[0]}")), None)
            there = f" (there is {other})" if other else ""
            raise ModelError(f"{called}: it {what} {', '.join(wrong[:NAMED])}{more}{there}; save it whole again")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers says nothing meanwhile: its report, a table of warnings, becomes one line of ours."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


class Pieces:
    """Weights that were cut on their way into a model, where a placeholder of the same shape, without memory, stands
    for each until the model is complete: transformers ties weights by what it finds there.
    """

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._pieces: dict[nn.Parameter, nn.Parameter] = {}
        self._not_finite: set[nn.Parameter] = set()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """While inside, a weight that is there whole is cut when a module gets it, and files are read weight by weight:
        neither ahead by threads, nor through a map of the file, of which every page that was seen stays in memory.
        """

        def read(file: str, **settings: Any) -> Any:
            return safe_open(file, **{**settings, "backend": "pread"})

        one_by_one = mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1")
        hook = register_module_parameter_registration_hook(self._take)  # type: ignore[arg-type]  # may give another
        try:
            with one_by_one, mock.patch.object(modeling_utils, "safe_open", read):
                yield
        finally:
            hook.remove()

    def _take(self, module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter | None:
        if weight.is_meta or not getattr(weight, _THERE, False):
            return None
        placeholder = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        setattr(placeholder, _THERE, True)
        if not weight.isfinite().all():
            self._not_finite.add(placeholder)
        self._pieces[placeholder] = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        self._cut(self._pieces[placeholder])
        return placeholder

    def first_not_finite(self, model: nn.Module) -> str | None:
        """See `first_not_finite`."""
        return next((name for name, weight in model.named_parameters() if weight in self._not_finite), None)

    def put_into(self, model: Any) -> None:
        """The pieces take their places; what was not read, a new head, is cut too. Equal weights are tied, as of a
        model that is whole."""
        ties = getattr(model, "all_tied_weights_keys", {})
        for target, source in list(ties.items()):
            one, other = (self._pieces.get(model.get_parameter(name)) for name in (source, target))
            if one is not None and other is not None and one is not other:
                if self._cut.same(one, other):
                    self._pieces[model.get_parameter(target)] = one
                else:
                    del ties[target]
        drawn = [weight for weight in model.parameters() if weight not in self._pieces]
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight in self._pieces:
                    setattr(module, name, self._pieces[weight])
        for weight in drawn:
            self._cut(weight)


def first_not_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a weight with NaN or infinite values. Waits for the device once, not once a weight."""
    flags = {name: weight.detach().isfinite().all() for name, weight in weights}
    good = torch.stack(list(flags.values())).tolist() if flags else []
    return next((name for name, fine in zip(flags, good, strict=True) if not fine), None)


def write_shards(directory: Path, weights: Iterable[tuple[str, Tensor]], most: int = SHARD) -> None:
    """Write a model's weights as transformers reads them, in files of at most `most` bytes (one weight may have more):
    no more than that is held at once."""
    shards: list[list[str]] = []
    sizes: list[int] = []
    held: dict[str, Tensor] = {}

    def write() -> None:
        save_file(held, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        sizes.append(sum(weight.nbytes for weight in held.values()))
        held.clear()

    for name, weight in weights:
        if held and sum(one.nbytes for one in held.values()) + weight.nbytes > most:
            write()
        held[name] = weight.detach().cpu().contiguous()
    write()
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS]
    for i, name in enumerate(names):
        (directory / f"{i}.safetensors").rename(directory / name)
    if count > 1:
        weight_map = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def nf4_settings(dtype: str, device: str) -> dict[str, Any]:
    """Settings for `load_whole` of a model whose linear layers, but the LM head, are in 4 bits; it is on `device` then.

    NormalFloat4 with doubly quantised scales, as vLLM's `quantization: bitsandbytes` has it.
    """
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": quantization, "device_map": {"": device}}
