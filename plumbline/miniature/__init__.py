"""The miniature world: tokenizer, small causal model, prompts, targets and a ground-truth reward, from a seed alone.

What quickstart runs and what the tests of the algorithms measure (METHODS.md §6). Importing it imports no torch:
`build_world` does, when it has to build.
"""

from plumbline.miniature.build import World, build_world
from plumbline.miniature.language import NEGATIVE_TAG, POSITIVE_TAG, PRINCIPLE

__all__ = ["NEGATIVE_TAG", "POSITIVE_TAG", "PRINCIPLE", "World", "build_world"]
