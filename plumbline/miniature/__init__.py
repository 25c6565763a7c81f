"""The miniature world: tokenizer, small causal model, prompts, targets and a ground-truth reward, from a seed alone.

What quickstart runs and what the tests of the algorithms measure (METHODS.md §6); `build.build_world` makes one.
"""
