"""The weights that a learner trains: loaded once, with an adapter or whole, saved as PEFT or transformers read them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from plumbline.config.data import Model
from plumbline.config.learner import LoraPolicy
from plumbline.config.pipelines import Pipeline, RewardModel
from plumbline.data.ending import end_ids
from plumbline.data.tokenizer import load_tokenizer, read_tokenizer
from plumbline.models.digest import FORMS, adapter_digests, lora_scalings, weight_digests
from plumbline.models.group_logps import disable_dropout, group_logps, pack, pieces
from plumbline.models.loading import Cut, load_whole, nf4_settings, write_shards
from plumbline.records import Publication, TokenGroup
from plumbline.runs.checkpoint import write_directory
from plumbline.runs.policies import write_proof

if TYPE_CHECKING:
    from peft import LoraConfig


class LearnedPolicy:
    """A model in training mode, with no dropout but an adapter's; only what the pipeline's policy names is trained."""

    def __init__(
        self,
        section: Pipeline,
        origin: Model,
        dtype: Literal["float32", "bfloat16"],
        device: Literal["cpu", "cuda"],
        seed: int,
        cut: Cut | None = None,
    ) -> None:
        torch.manual_seed(seed)  # all workers draw the same initial weights
        self._section, self._origin, self._seed = section, origin, seed
        self._dtype: Literal["float32", "bfloat16"] = dtype
        self._reads_chats = not isinstance(section, RewardModel) or section.reads == "conversation"
        self.generates = not isinstance(section, RewardModel)
        quantize_on = device if section.learner.quantize else None
        model = load_model(origin, dtype, classifier=not self.generates, cut=cut, quantize_on=quantize_on)
        model.config.use_cache = False
        if self.generates:
            # Who reads the exported model stops where its answers were taught to end.
            ends = end_ids(self._tokenizer(), origin.path or "")
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        disable_dropout(model)
        if section.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = getattr(section, "policy", None)
        if isinstance(policy, LoraPolicy):
            from peft import get_peft_model

            # In the model's own dtype: PEFT would cast every input of every layer to the adapter's float32. What the
            # optimiser changes is in float32 all the same (`actors.learning.strategy.Masters`).
            model = get_peft_model(model, lora_config(policy), autocast_adapter_dtype=False)
            adapter: Any = model.peft_config["default"]
            if not isinstance(adapter.target_modules, str):
                adapter.target_modules = sorted(adapter.target_modules)  # a set is written in another order each time
        self.model: Any = model.to(device)
        self.model.train()
        self.trainable = [p for _, p in self.named_trainable()]

    def named_trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trainable parameters by name."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def probe(self, groups: Sequence[TokenGroup]) -> list[float]:
        """See `probe_logps`; for a model that is whole on this worker."""
        return probe_logps(self.model, groups, self._section.learner.micro_tokens)

    def save(
        self,
        directory: Path,
        publication: Publication,
        weights: Iterable[tuple[str, Tensor]] | None = None,
        *,
        adapter: bool,
    ) -> None:
        """Write weights and what proves them, aside and renamed: an adapter, or a whole model with its tokenizer.

        Args:
            publication: what it lacks of a proof, the digests of what is written, is added.
            weights: parameters by name, where the model does not hold them whole: the trainable ones for an adapter
                and for a model that was trained through one, which is merged here; else all. Taken one at a time.
        """

        dtype = FORMS[self._dtype]
        digests: dict[str, dict[str, str]] = {form: {} for form in FORMS}

        def noted(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                for form, found in weight_digests({name: weight}, dtype).items():
                    digests[form].update(found)
                yield name, weight

        def write(aside: Path) -> None:
            if adapter:
                trained = dict(given)
                self.model.save_pretrained(aside, state_dict=trained, safe_serialization=True)
                (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
                digests.update(adapter_digests(self._modules(trained), dtype))
            elif hasattr(self.model, "peft_config"):
                self._merged(dict(given)).save_pretrained(aside, safe_serialization=True)
                self._tokenizer().save_pretrained(aside)
            else:
                self._write_whole(aside, noted(given))
                self._tokenizer().save_pretrained(aside)
            write_proof(aside, replace(publication, digests=digests))

        given = self.model.named_parameters() if weights is None else weights
        write_directory(directory, write)

    def _modules(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
        """An adapter's A, B and scaling by module."""
        prefix = "base_model.model."
        return {
            name: (
                weights[f"{prefix}{name}.lora_A.default.weight"],
                weights[f"{prefix}{name}.lora_B.default.weight"],
                scaling,
            )
            for name, scaling in lora_scalings(self.model, "default").items()
        }

    def _write_whole(self, aside: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        kept = self.model.state_dict()
        buffers = {name: kept[name] for name, _ in self.model.named_buffers() if name in kept}
        if getattr(self.model, "_weight_conversions", None):  # its files name other weights, made of several of these
            self.model.save_pretrained(aside, state_dict={**buffers, **dict(weights)}, safe_serialization=True)
            return
        self.model.save_pretrained(aside, state_dict={}, safe_serialization=True)  # its configs alone
        for file in aside.glob("*.safetensors"):
            file.unlink()
        write_shards(aside, itertools.chain(buffers.items(), weights))

    def _merged(self, weights: Mapping[str, Tensor]) -> Any:
        """A second model with the adapter merged into it: this one is trained on, and may not be whole."""
        learner = self._section.learner.model_copy(update={"quantize": None})  # merged in 4 bits it would round away
        section = self._section.model_copy(update={"learner": learner})
        other = LearnedPolicy(section, self._origin, self._dtype, "cpu", self._seed)
        with torch.no_grad():
            for name, parameter in other.named_trainable():
                parameter.copy_(weights[name])
        return other.model.merge_and_unload()

    def _tokenizer(self) -> Any:
        if self._reads_chats or self._origin.chat_template:
            origin = self._origin
            return load_tokenizer(origin.tokenizer_path, origin.chat_template, origin.template_args)
        return read_tokenizer(self._origin.tokenizer_path)


def probe_logps(model: Any, groups: Sequence[TokenGroup], micro_tokens: int) -> list[float]:
    """Mean log-prob a token of every response, in order; at most `micro_tokens` of a forward, as in training.

    An adapter's dropout is off, as it is in an engine.
    """
    groups = [piece for group in groups for piece in pieces(group, micro_tokens)]
    means: dict[int, list[float]] = {}
    for indices in pack(groups, micro_tokens):
        with torch.no_grad(), evaluating(model):
            logps_GK, tokens_GK = group_logps(model, [groups[i] for i in indices])
        for i, logps, tokens in zip(indices, logps_GK, tokens_GK, strict=True):
            there = tokens > 0
            means[i] = (logps[there] / tokens[there]).tolist()
    return [mean for i in range(len(groups)) for mean in means[i]]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A model in evaluation mode, and afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def lora_config(policy: LoraPolicy) -> "LoraConfig":
    """What PEFT makes of a policy, and writes into its adapters' adapter_config.json."""
    from peft import LoraConfig

    return LoraConfig(
        r=policy.r,
        lora_alpha=policy.alpha,  # type: ignore[arg-type]  # PEFT divides by r or its root: any number does
        use_rslora=policy.rslora,
        lora_dropout=policy.dropout,
        target_modules=policy.target_modules,
        modules_to_save=policy.modules_to_save or None,
        task_type="CAUSAL_LM",
    )


def load_model(
    origin: Model, dtype: str, *, classifier: bool = False, cut: Cut | None = None, quantize_on: str | None = None
) -> Any:
    """A causal language model, or a one-logit classifier, from a directory or from a config with random weights.

    Args:
        cut: see `load_whole`; random weights are drawn whole, or they would be others than those of an uncut model.
        quantize_on: the device that it is put on in 4 bits (`nf4_settings`); None leaves it whole, on the CPU.

    Raises:
        ModelError: see `load_whole`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    factory = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    extra = {"num_labels": 1} if classifier else {}
    if origin.path is not None:
        quantized = nf4_settings(dtype, quantize_on) if quantize_on else {}
        model = load_whole(factory, origin.path, dtype, new_head=classifier, cut=cut, **extra, **quantized)
    else:
        assert origin.init is not None
        tokenizer = read_tokenizer(origin.tokenizer_path)
        settings = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = AutoConfig.for_model(**{**settings, **origin.init, **extra})
        model = factory.from_config(config)
        for weight in model.parameters():  # buffers, such as rotary frequencies, keep their precision
            weight.data = weight.data.to(getattr(torch, dtype))
    if classifier and model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model
