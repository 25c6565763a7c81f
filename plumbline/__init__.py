"""Aligns language models without human preference labels. Pure Python: never imports ray, vllm or deepspeed."""

__version__ = "0.1.0"
