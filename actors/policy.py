"""The weights that a learner trains: loaded once, with an adapter or whole, saved as PEFT or transformers read them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from plumbline.checkpoint import write_directory
from plumbline.config import LoraPolicy, Model, Pipeline, RewardModel
from plumbline.modeling import disable_dropout, group_logps
from plumbline.policies import write_proof
from plumbline.prompting import load_tokenizer, read_tokenizer
from plumbline.records import Publication, TokenGroup


class LearnedPolicy:
    """A model in training mode, without dropout; only what the pipeline's policy names is trainable."""

    def __init__(
        self,
        section: Pipeline,
        origin: Model,
        dtype: Literal["float32", "bfloat16"],
        device: Literal["cpu", "cuda"],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)  # all workers draw the same initial weights
        self._origin = origin
        self._reads_chats = not isinstance(section, RewardModel) or section.reads == "conversation"
        self.device = torch.device(device)
        model = load_model(origin, dtype, classifier=isinstance(section, RewardModel))
        model.config.use_cache = False
        if section.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = getattr(section, "policy", None)
        if isinstance(policy, LoraPolicy):
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=policy.r,
                lora_alpha=policy.alpha,  # type: ignore[arg-type]  # PEFT divides by r: any number does
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, lora)
        self.model: Any = model.to(self.device)
        disable_dropout(self.model)
        self.model.train()
        self.trainable = [p for _, p in self.named_trainable()]

    def named_trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trainable parameters by name."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def probe(self, groups: Sequence[TokenGroup]) -> list[float]:
        """Mean log-prob a token of every response, in order; empty without groups."""
        if not groups:
            return []
        with torch.no_grad():
            logps_GK, tokens_GK = group_logps(self.model, list(groups))
        there = tokens_GK > 0
        return (logps_GK[there] / tokens_GK[there]).tolist()

    def save(self, directory: Path, publication: Publication, *, adapter: bool) -> None:
        """Write the weights and what proves them, aside and renamed: an adapter, or a whole model with its tokenizer.

        A whole model that was trained through an adapter is merged for good: call it once, at the end.
        """

        def write(aside: Path) -> None:
            if adapter:
                self.model.save_pretrained(aside, safe_serialization=True)
                (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            else:
                whole = self.model.merge_and_unload() if hasattr(self.model, "peft_config") else self.model
                whole.save_pretrained(aside, safe_serialization=True)
                self._tokenizer().save_pretrained(aside)
            write_proof(aside, publication)

        write_directory(directory, write)

    def _tokenizer(self) -> Any:
        if self._reads_chats or self._origin.chat_template:
            return load_tokenizer(self._origin.tokenizer_path, self._origin.chat_template)
        return read_tokenizer(self._origin.tokenizer_path)


def load_model(origin: Model, dtype: str, *, classifier: bool = False) -> Any:
    """A causal language model, or a one-logit classifier, from a directory or from a config with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    factory = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    extra = {"num_labels": 1} if classifier else {}
    if origin.path is not None:
        model = factory.from_pretrained(
            origin.path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, **extra
        )
    else:
        assert origin.init is not None
        tokenizer = read_tokenizer(origin.tokenizer_path)
        settings = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = AutoConfig.for_model(**{**settings, **origin.init, **extra})
        model = factory.from_config(config).to(getattr(torch, dtype))
    if classifier and model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model
