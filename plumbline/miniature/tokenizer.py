"""The word-level tokenizer of the miniature world, a `PreTrainedTokenizerFast` with a ChatML template.

A token is a word with the space before it, a punctuation mark, or a line break, so decoding joins tokens with nothing
between and gives back exactly the text that was encoded: no normalisation at all. Words outside the language become
``<unk>``, which decoding without special tokens leaves out. Called by `build`.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from plumbline.data.prompting import CONTRASTS, PRINCIPLES
from plumbline.data.tokenizer import TEMPLATES
from plumbline.miniature import language, wording
from plumbline.miniature.topics import ASPECTS, TOPICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, EOS, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
PIECE = r" ?[A-Za-z]+|[^A-Za-z]"
_ROLES = ("system", "user", "assistant")
_MARKS = " \n.,?!:;'\"()-"


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer; it depends on the language alone, not on a seed."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=[BEGIN],
        chat_template=TEMPLATES["chatml"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


def vocabulary() -> list[str]:
    """All tokens in order of id: special ones, marks, roles, words. A word that can open a text has two tokens."""
    pieces = {piece for text in _texts() for piece in re.findall(PIECE, text)}
    opening = {piece.strip() for piece in pieces if piece.strip().istitle()}
    words = pieces | opening | {f" {word}" for word in opening}
    rest = sorted(words - set(_MARKS) - set(_ROLES))
    return [PAD, BEGIN, EOS, UNKNOWN, *_MARKS, *_ROLES, *rest]


def _texts() -> Iterator[str]:
    """Texts that hold every word of the language: templates without their fields, and what fields are filled with."""
    for name, value in vars(wording).items():
        for text in _strings(value) if name.isupper() else ():
            yield re.sub(r" ?\{\w+\}", "", text) if " " in text or "{" in text else f" {text}"
    for topic in TOPICS:
        yield from (f" {text}" for text in (topic.name, *topic.facts))
    yield from (f" {name}" for name in (*ASPECTS, "the", "and", "an", "An"))
    yield from (language.PRINCIPLE, language.POSITIVE_TAG, language.NEGATIVE_TAG, *PRINCIPLES.values())
    yield from (side for contrast in CONTRASTS.values() for side in (contrast.positive, contrast.negative))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
