"""What vLLM's own workers do for `actors.engines.vllm`: mixed into their class, so it runs where the weights are."""

from typing import Any


class ReplacesWeights:
    """A `worker_extension_cls`. vLLM calls its methods by name."""

    def replace_weights(self: Any, path: str) -> None:
        """Load all weights of a model's directory in place.

        On CPUs vLLM multiplies by packed copies of weights, and packs anew only the layers whose weights the files
        name. An output embedding that is tied to the input's is not named: it would go on with its old copy.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        self.reload_weights(weights_path=path)
        for layer in self.model_runner.get_model().modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(layer)
