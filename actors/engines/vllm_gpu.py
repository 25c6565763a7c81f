"""What vLLM's workers on GPUs get from `actors.engines.vllm`: they tell what they hold, and find again what an earlier
run compiled.

vLLM keeps what torch.compile made of a model, and the Triton kernels of its adapters, under a hash of its settings. The
model's directory is among them, though nothing that is compiled depends on it, and a π0 of the `sft` stage lies in
another for every run: each would compile all anew. Importing this in a worker's process leaves the directory out.
"""

import copy
from typing import Any

from vllm.config import ModelConfig

from actors.engines.vllm_worker import ReadsBack

_hash_with_place = ModelConfig.compute_hash


class OnGpu(ReadsBack):
    """A `worker_extension_cls`. Without whole weights to replace, the import of this file is what counts."""


def hash_without_place(self: Any) -> str:
    """vLLM's hash of a `ModelConfig`, as it would be wherever the model lay."""
    anywhere = copy.copy(self)
    anywhere.model = anywhere.model_weights = ""
    return _hash_with_place(anywhere)


ModelConfig.compute_hash = hash_without_place
