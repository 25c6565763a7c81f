"""A random model of a few thousand weights with the miniature world's tokenizer, and a config that runs PLE on it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from actors.engines.seam import EngineSpec

PRINCIPLE = "Answer by these rules. Refuse harmful requests."


def make_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Two layers of random weights: no language, but real log-probs, real sampling, real adapters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from plumbline.miniature.tokenizer import make_tokenizer

    tokenizer: Any = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_adapter(directory: Path, base: Path, **settings: Any) -> Path:
    """A LoRA adapter on all linear layers whose weights are random; `settings` are PEFT's LoraConfig's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    asked = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**asked)).save_pretrained(str(directory))
    return directory


def make_byte_tokenizer(directory: Path, *special: str, **settings: Any) -> Path:
    """A byte a token, the `special` ones before them, as files; `settings` are those of tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=list(special), eos_token=special[0]
    )
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **settings}), "utf-8")
    return directory


def engine_spec(model: Path | str, **changes: Any) -> EngineSpec:
    """An engine on this machine's CPU that is small in all ways."""
    spec = EngineSpec(
        model_path=str(model),
        dtype="float32",
        device="cpu",
        max_model_len=192,
        max_num_seqs=64,
        max_lora_rank=8,
        max_adapters=4,
        threads=1,
        kv_cache_gib=0.25,
        memory_share=0.5,
        seed=0,
    )
    return replace(spec, **changes)


def make_tiny_embedder(directory: Path) -> Path:
    """The miniature world's embedder, with frequencies of a handful of texts."""
    from plumbline.miniature.embedder import make_embedder
    from plumbline.miniature.tokenizer import make_tokenizer

    make_embedder(directory, make_tokenizer(), ["The goat eats grass.", "I will not help you."], seed=0)
    return directory


def make_prompts(path: Path, count: int, seed: int = 0) -> Path:
    """Requests of the miniature world, with targets."""
    from plumbline.miniature.language import TARGET, sample_answer, sample_request

    rng = Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            request = sample_request(rng, harmful=False)
            row = {"id": f"p{i}", "prompt": request.render(), "target": sample_answer(request, TARGET, rng)}
            file.write(json.dumps(row) + "\n")
    return path


def tiny_config(directory: Path, **ple: Any) -> dict[str, Any]:
    """PLE over 64 prompts in 8 steps; `ple` overrides the pipeline's section."""
    if not (directory / "model").exists():
        make_tiny_model(directory / "model")
        make_prompts(directory / "prompts.jsonl", 64)
    return {
        "name": "tiny",
        "model": {"path": str(directory / "model"), "max_len": 128},
        "data": {"train": {"path": str(directory / "prompts.jsonl")}, "max_prompt_tokens": 64},
        "reward": {"type": "program", "function": "plumbline.miniature.reward:score"},
        "pipelines": [
            {
                "type": "ple",
                "batch_size": 8,
                "principle": PRINCIPLE,
                "generation": {"max_tokens": 16},
                "replay_window": 2,
                "learner": {"lr": 1e-3, "batch_size": 8},
                **ple,
            }
        ],
    }


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    """A config as a file."""
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> str:
    """A JSON Lines file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def preference(i: int, rejected: object = "No.") -> dict[str, object]:
    """A row of a preference file."""
    return {"prompt": f"Why {i}?", "chosen": "So it is.", "rejected": rejected}
