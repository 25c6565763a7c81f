"""How a turn ends: which tokens end an answer, which of them a target ends with, and what a sampled answer becomes.

The one owner of it: engines stop at `end_ids`, and whatever ended a sample, in a row it ends as a target does. So no
method can tell its positives from its negatives by their last token.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from plumbline.data.counting import encode_texts, most_tokens
from plumbline.data.tokenizer import render_text
from plumbline.errors import ModelError
from plumbline.records import Completion, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_MARK = "plumbanswerline"  # no word of any template
_turn_ends: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, int | None]]" = WeakKeyDictionary()


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What a target ends with: the token that the chat template writes after an assistant's turn, else EOS."""
    end = _turn_end(tokenizer)
    assert end is not None, "load_tokenizer refuses a tokenizer without EOS"
    return end


def end_ids(tokenizer: "PreTrainedTokenizerBase", model_path: str) -> list[int]:
    """All tokens that end an answer of a model, ascending: `turn_end`, EOS, and what the model's own files name.

    What these name is an end where it is one of the tokenizer's added tokens: transformers writes the default of an
    architecture into a config, which is an ordinary word to another tokenizer.

    Raises:
        ModelError: a file of the model's that is no JSON object.
    """
    named = _named_ends(Path(model_path)) & set(tokenizer.added_tokens_decoder)
    own = (tokenizer.eos_token_id, _turn_end(tokenizer))
    return sorted(named | {end for end in own if isinstance(end, int)})


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str, *, ended: bool = True) -> list[int]:
    """Token ids of a response, to be put after those of its prompt; `turn_end` follows iff it `ended` by itself
    (METHODS.md §0).

    What looks like a special token in the text is encoded as the characters it is written with: an answer that quotes
    an end-of-turn mark does not end there.
    """
    [ids] = encode_texts(tokenizer, [text], split_special_tokens=True)
    return [*ids, turn_end(tokenizer)] if ended else ids


def encode_responses(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` of texts that ended, in one call of the tokenizer."""
    ids = encode_texts(tokenizer, texts, split_special_tokens=True)
    return [[*one, turn_end(tokenizer)] for one in ids]


def most_of_responses(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[int | None]:
    """What none of `encode_responses` has more tokens than, without tokenising them; None where nobody knows."""
    mosts = (most_tokens(tokenizer, text, split_special_tokens=True) for text in texts)
    return [None if most is None else most + 1 for most in mosts]


def completion(
    tokenizer: "PreTrainedTokenizerBase",
    ends: Collection[int],
    ids: Sequence[int],
    stop: Sequence[str],
    *,
    stopped: bool,
) -> Completion:
    """A sampled answer as rows hold it. One that `stopped`, at any of `ends` or at a stop string, ends in `turn_end`.

    A stop string is a way to end a turn: it leaves no trace in text and ids. One that was cut off has no end.
    """
    sampled = list(ids[:-1]) if stopped and ids and ids[-1] in ends else list(ids)
    text = decode(tokenizer, sampled)
    left = strip_stop(text, stop)
    if left != text:
        sampled = _before(tokenizer, sampled, left)
    ended = stopped or left != text
    return Completion(
        text=left,
        ids=[*sampled, turn_end(tokenizer)] if ended else sampled,
        finish_reason="stop" if ended else "length",
    )


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Text of a response: no special tokens, and none of a padded vocabulary."""
    if not tokenizer.is_fast:  # it raises an IndexError for an id without a token; others pass over it
        ids = [one for one in ids if one < len(tokenizer) or one in tokenizer.added_tokens_decoder]
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def strip_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it; all of it where there is none (METHODS.md §4)."""
    found = [text.find(mark) for mark in stop if mark and mark in text]
    return text[: min(found)] if found else text


def _before(tokenizer: "PreTrainedTokenizerBase", ids: list[int], text: str) -> list[int]:
    """The tokens that say `text`, the beginning of what `ids` say; encoded anew where it ends inside of one."""
    for count in range(len(ids), -1, -1):
        said = decode(tokenizer, ids[:count])
        if said == text:
            return ids[:count]
        if len(said) < len(text):
            break
    return encode_response(tokenizer, text, ended=False)


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    known = _turn_ends.setdefault(tokenizer, {})
    if template not in known:
        written = _written_end(tokenizer) if template else None
        eos = tokenizer.eos_token_id
        known[template] = written if written is not None or not isinstance(eos, int) else eos
    return known[template]


def _written_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The added token that the template writes behind an answer, spaces aside; None where that is none."""
    turns = [Message(role="user", content="?"), Message(role="assistant", content=_ANSWER_MARK)]
    try:
        _, answer, tail = render_text(tokenizer, turns, generate=False).rpartition(_ANSWER_MARK)
    except ModelError:
        return None
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content}
    longest_first = sorted(added, key=len, reverse=True) if answer else []
    return next((added[mark] for mark in longest_first if tail.lstrip().startswith(mark)), None)


def _named_ends(directory: Path) -> set[int]:
    """`eos_token_id` of generation_config.json, else of config.json: one or several."""
    for file in (directory / "generation_config.json", directory / "config.json"):
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text("utf-8"))
            ends = settings.get("eos_token_id", (settings.get("text_config") or {}).get("eos_token_id"))
        except (ValueError, AttributeError):
            raise ModelError(f"{file}: not a JSON object; it is a model's settings") from None
        if ends is not None:
            return set(ends) if isinstance(ends, list) else {ends}
    return set()
