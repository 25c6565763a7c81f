"""What computes a generator's tokens: vLLM, or plain transformers."""
