"""How large the models of a run are, by their files, without loading any: what a plan counts with."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline.config.data import ClassifierReward, Model
from plumbline.config.tree import Config
from plumbline.errors import ModelError, in_one_line
from plumbline.runs.policies import model_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model. `parameters` are numbers, `stored` is bytes of its files, 0 where it has none yet."""

    parameters: int
    stored: int = 0
    layers: int = 0
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab: int = 0

    def adapter(self, rank: int) -> int:
        """Numbers of a LoRA adapter on all linear layers but the LM head."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ends = 2 * (self.hidden + query) + 2 * (self.hidden + key) + 3 * (self.hidden + self.intermediate)
        return rank * self.layers * ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The models of a run. `rewards` are its classifiers, by their keys in the config."""

    model: Shape
    rewards: Mapping[str, Shape] = field(default_factory=dict)
    embedder: Shape | None = None


def read_sizes(config: Config) -> Sizes:
    """Sizes of all models that a config names. Raises ModelError where a file cannot be read."""
    classifiers = {key: one for key, one in config.rewards.items() if isinstance(one, ClassifierReward)}
    return Sizes(
        model=read_model(config.model),
        rewards={key: read_shape(Path(model_path(one.path))) for key, one in classifiers.items()},
        embedder=_embedder(Path(config.embedder.path)) if config.embedder else None,
    )


def read_model(model: Model) -> Shape:
    """The base model, by its files or by the config that its random weights are made from. Raises ModelError."""
    return read_shape(Path(model.path)) if model.path is not None else _of_init(model)


def read_shape(directory: Path) -> Shape:
    """A model by its config.json and the headers of its safetensors. Raises ModelError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}: its config.json cannot be read ({in_one_line(error)})") from None
    parameters, stored = _stored(directory.glob("*.safetensors"))
    return Shape(parameters=parameters, stored=stored, **_dimensions(config))


def _embedder(directory: Path) -> Shape:
    """Sentence-transformers keeps each of its modules in a folder."""
    parameters, stored = _stored(directory.rglob("*.safetensors"))
    return Shape(parameters=parameters, stored=stored)


def _of_init(model: Model) -> Shape:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from plumbline.data.tokenizer import read_tokenizer

    assert model.init is not None
    config = AutoConfig.for_model(**{"vocab_size": len(read_tokenizer(model.tokenizer_path)), **model.init})
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    return Shape(parameters=sum(p.numel() for p in made.parameters()), **_dimensions(config))


def _dimensions(config: "PreTrainedConfig") -> Mapping[str, Any]:
    """What estimates of activations and KV cache need; 0 where a config has no such thing."""
    text: Any = config.get_text_config()
    hidden, heads = getattr(text, "hidden_size", 0), getattr(text, "num_attention_heads", 1)
    return {
        "layers": getattr(text, "num_hidden_layers", 0),
        "hidden": hidden,
        "intermediate": getattr(text, "intermediate_size", None) or 4 * hidden,
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or hidden // heads,
        "vocab": getattr(text, "vocab_size", 0),
    }


def _stored(files: Iterable[Path]) -> tuple[int, int]:
    """Numbers in safetensors, and bytes of the files."""
    from safetensors import SafetensorError, safe_open

    numbers = size = 0
    for file in sorted(files):
        try:
            with safe_open(file, framework="numpy") as tensors:
                names = list(tensors.keys())
                numbers += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
            size += file.stat().st_size
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read ({in_one_line(error)}); save the model again") from None
    return numbers, size
