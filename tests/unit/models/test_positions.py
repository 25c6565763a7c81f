"""How many tokens a model reads: by hand, for each way in which configs say it."""

from typing import Any

import pytest
from transformers import AutoConfig

from plumbline.models.positions import positions

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 1e4}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "settings", "most"),
    [
        ("llama", {"max_position_embeddings": 256}, 256),
        ("gpt2", {"n_positions": 128}, 128),
        ("opt", {}, 2048),  # two rows more in its table, which are no positions
        ("bert", {"max_position_embeddings": 64}, 64),
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),  # it counts from after its padding's
        ("deberta-v2", {"position_biased_input": False, "relative_attention": True}, None),
        ("qwen2", {"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
        ("llama", {"max_position_embeddings": 4096, "rope_parameters": LINEAR}, 8192),
        ("llama", {"max_position_embeddings": 131072, "rope_parameters": LLAMA3}, 131072),
        ("mistral", {"max_position_embeddings": 32768, "sliding_window": 4096}, 32768),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_positions(kind: str, settings: dict[str, Any], most: int | None) -> None:
    assert positions(AutoConfig.for_model(kind, **settings)) == most
