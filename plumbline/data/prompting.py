"""Conversations to token ids: chat templates, where a principle goes, and our own wording of principles and contrasts.

Called by the pipelines for every prompt and response, by the miniature and by evaluation. Importing this module imports
neither transformers nor torch: `load_tokenizer` does.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plumbline.config.pipelines import Contrasts, Dlma, MethodSection
from plumbline.errors import ConfigError, ModelError
from plumbline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A wanted quality and its opposite, each said as a short principle: DLMA's p+ and p- (METHODS.md §1)."""

    positive: str
    negative: str


PRINCIPLES: Mapping[str, str] = {
    "harmless": (
        "Answer by these rules. Be ethical: take no part in harm, crime, hatred or deceit, and say so politely when "
        "asked to. Be informative: give correct facts and name the reasons for them. Be helpful: find the honest need "
        "behind the question and serve it."
    ),
    "positive": (
        "Write something positive. Praise what is good, with enthusiasm and warmth, and sound sincere: name particular "
        "things that you liked."
    ),
    "faithful_summary": (
        "Summarise by these rules. Be concise: one or two sentences with the main point first. Be faithful: say only "
        "what the text says, and leave out nothing that changes its meaning."
    ),
}

CONTRASTS: Mapping[str, Contrast] = {
    "harmless": Contrast(
        positive="Give a lawful, ethical and inoffensive answer.",
        negative="Give an unlawful, unethical and offensive answer.",
    ),
    "helpful": Contrast(
        positive="Give a helpful, informative and relevant answer.",
        negative="Give an unhelpful, uninformative and irrelevant answer.",
    ),
    "positive": Contrast(positive="Write something positive.", negative="Write something negative."),
}

# Both open with BOS where the tokenizer has one, as base models were trained; `plain` ends earlier assistant turns with
# EOS, as our responses end. A header that ends in a newline lets a response begin without a leading space.
TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{{ bos_token | default('', true) }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token | default('', true) }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
        "{% elif m['role'] == 'user' %}User:\n{{ m['content'] }}\n\n{% else %}Assistant:\n{{ m['content'] }}"
        "{{ eos_token }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
    ),
}

# Not words of any template, so that finding them in a rendering means that the template kept them.
_SYSTEM_MARK, _USER_MARK = "plumbsystemline", "plumbuserline"
_keeps_system: dict[str, bool] = {}


def principle_text(name_or_text: str) -> str:
    """The principle itself: a preset of `PRINCIPLES` by name, any other text as it is.

    Raises:
        ConfigError: blank, or one bare word that names no preset (a misspelt name would else become the principle).
    """
    if name_or_text in PRINCIPLES:
        return PRINCIPLES[name_or_text]
    if not name_or_text.strip():
        raise ConfigError(f"the principle is blank: write one, or name a preset: {_names(PRINCIPLES)}")
    if re.fullmatch(r"[A-Za-z0-9_\-]+", name_or_text):
        raise ConfigError(f"principle {name_or_text!r} is no preset{_nearest(name_or_text, PRINCIPLES)}")
    return name_or_text


def contrast(name: str | None = None, *, positive: str | None = None, negative: str | None = None) -> Contrast:
    """A preset of `CONTRASTS` by name, either side of which may be replaced; without a name both sides are needed.

    Raises:
        ConfigError: an unknown name, a missing or blank side, or two sides that say the same.
    """
    if name is not None and name not in CONTRASTS:
        raise ConfigError(f"contrast {name!r} is no preset{_nearest(name, CONTRASTS)}")
    preset = CONTRASTS[name] if name is not None else Contrast(positive="", negative="")
    pair = Contrast(
        positive=preset.positive if positive is None else positive,
        negative=preset.negative if negative is None else negative,
    )
    for side in ("positive", "negative"):
        if not getattr(pair, side).strip():
            raise ConfigError(f"the contrast has no {side} side: write one, or name a preset: {_names(CONTRASTS)}")
    if pair.positive == pair.negative:
        raise ConfigError("the contrast's two sides are the same text: every self-reward would be 0; make them differ")
    return pair


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    principle: str | None = None,
    response_prefix: str = "",
) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins (METHODS.md §0: prompt and response apart).

    Args:
        principle: placed by `place_principle`; None for the plain prompt, which all log-probs and rewards use.
        response_prefix: text that the answer continues, part of the prompt; tokenised by itself.

    Raises:
        ModelError: the chat template refuses the conversation.
    """
    text = render_text(tokenizer, messages, principle)
    # a template writes the special tokens that it wants itself
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids + tokenizer.encode(response_prefix, add_special_tokens=False) if response_prefix else ids


def render_all(
    tokenizer: "PreTrainedTokenizerBase", asked: Sequence[tuple[Sequence[Message], str | None]]
) -> list[list[int]]:
    """`render` of conversations with their principles in one call of the tokenizer.

    Each call lets go of the interpreter's lock, and a busy process is slow to get it back.

    Raises:
        ModelError: the chat template refuses one of them.
    """
    texts = [render_text(tokenizer, messages, principle) for messages, principle in asked]
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def render_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], principle: str | None) -> str:
    """What `render` tokenises. Raises ModelError: the chat template refuses the conversation."""
    return _render_text(tokenizer, place_principle(tokenizer, messages, principle))


def steerings(section: MethodSection) -> list[str]:
    """What a method puts before its prompts: PLE's principle, DLMA's contrasts. Raises ConfigError."""
    if isinstance(section, Dlma):
        pairs = (dlma_contrast(section.contrast), dlma_contrast(section.scoring or section.contrast))
        return [side for pair in pairs for side in (pair.positive, pair.negative)]
    return [principle_text(section.principle)] if section.type == "ple" else []


def dlma_contrast(settings: Contrasts) -> Contrast:
    """Both sides, presets filled in. Raises ConfigError."""
    return contrast(settings.preset, positive=settings.positive, negative=settings.negative)


def place_principle(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], principle: str | None
) -> list[Message]:
    """The conversation with `principle` in it: in the system turn where the template keeps one, before any system text
    that is there already, else before the last query (METHODS.md §3).

    A template without a system turn would drop or refuse a dataset's own one: its text moves before the first query.
    """
    turns = list(messages)
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    if principle is None and system is None:
        return turns
    if keeps_system(tokenizer):
        content = "\n\n".join(text for text in (principle, system) if text)
        return [Message(role="system", content=content), *turns]
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    for index, text in ((first, system), (len(turns) - 1, principle)):
        if text:
            turns[index] = Message(role=turns[index].role, content=f"{text}\n\n{turns[index].content}")
    return turns


def keeps_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template has a system turn, found by rendering one: it neither raises nor drops its text."""
    template = tokenizer.get_chat_template()
    if template not in _keeps_system:
        turns = [Message(role="system", content=_SYSTEM_MARK), Message(role="user", content=_USER_MARK)]
        try:
            text = _render_text(tokenizer, turns)
        except ModelError:
            text = ""
        _keeps_system[template] = _SYSTEM_MARK in text and _USER_MARK in text
    return _keeps_system[template]


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str, *, ended: bool = True) -> list[int]:
    """Token ids of a response, to be put after those of `render`; EOS follows iff it `ended` by itself (METHODS.md §0).

    What looks like a special token in the text is encoded as the characters it is written with: an answer that quotes
    an end-of-turn mark does not end there.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return [*ids, _eos(tokenizer)] if ended else ids


def encode_responses(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` of texts that ended, in one call of the tokenizer."""
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    return [[*one, _eos(tokenizer)] for one in ids]


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Text of a response: no special tokens, none of a padded vocabulary, nothing from the first stop string on."""
    if not tokenizer.is_fast:  # it raises an IndexError for an id without a token; others pass over it
        ids = [one for one in ids if one < len(tokenizer) or one in tokenizer.added_tokens_decoder]
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return strip_stop(text, stop)


def strip_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it; all of it where there is none (METHODS.md §4)."""
    found = [text.find(mark) for mark in stop if mark and mark in text]
    return text[: min(found)] if found else text


def load_tokenizer(path: str, chat_template: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory (or of a model of the hub), ready for `render` and `encode_response`.

    Args:
        path: a directory with a tokenizer in it, or a hub name like ``org/model``. No code from it is run.
        chat_template: None for the tokenizer's own, a name of `TEMPLATES`, or the path of a Jinja file.

    Raises:
        ModelError: no such model, no tokenizer in it, no EOS, no template, or a template that cannot be used.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {path}: its tokenizer has no EOS token; name one as eos_token in tokenizer_config.json"
        )
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    _check_template(tokenizer, path, chat_template)
    return tokenizer


def read_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory or hub name as its files say, with or without a chat template.

    A directory whose tokenizer declares no architecture's class is read from its tokenizer.json alone: `AutoTokenizer`
    would put the pre-tokenizer of the model's architecture in place of the one that is written there.

    Raises:
        ModelError: no such model, or no tokenizer in it that can be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or directory.exists()
    if looks_local and not directory.is_dir():
        raise ModelError(f"model {path}: no such directory; model.path is a directory or a hub name like org/model")
    try:
        if looks_local and _declared_class(directory) in _GENERIC_CLASSES:
            return PreTrainedTokenizerFast.from_pretrained(str(directory))
        return AutoTokenizer.from_pretrained(str(directory) if looks_local else path, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds here, from OSError to those of its Rust parts
        raise ModelError(_not_loaded(path, directory if looks_local else None, error)) from error


_GENERIC_CLASSES = {"TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast"}


def _declared_class(directory: Path) -> str | None:
    file = directory / "tokenizer_config.json"
    if not (file.is_file() and (directory / "tokenizer.json").is_file()):
        return None
    return json.loads(file.read_text("utf-8")).get("tokenizer_class")


def _render_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja runs the template's code: it can fail as any code can
        roles = ", ".join(turn.role for turn in messages)
        raise ModelError(f"the chat template refuses the turns ({roles}): {_first_line(error)}") from error
    assert isinstance(text, str)
    return text


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int), "load_tokenizer refuses a tokenizer without EOS"
    return eos


def _template_text(chat_template: str) -> str:
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template]
    file = Path(chat_template).expanduser()
    if not file.is_file():
        near = _nearest(chat_template, TEMPLATES)
        raise ModelError(f"model.chat_template {chat_template!r} is neither a file nor a built-in name{near}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"model.chat_template {chat_template}: not UTF-8 at byte {error.start}") from error


def _check_template(tokenizer: "PreTrainedTokenizerBase", path: str, chat_template: str | None) -> None:
    """Renders one turn, so that a template that cannot be used is refused before anything runs."""
    if not tokenizer.chat_template:
        names = _names(TEMPLATES)
        raise ModelError(
            f"model {path} has no chat template: set model.chat_template to a Jinja file or one of {names}"
        )
    name = f"chat template {chat_template}" if chat_template else f"the chat template of model {path}"
    try:
        text = _render_text(tokenizer, [Message(role="user", content=_USER_MARK)])
    except ModelError as error:
        raise ModelError(f"{name} cannot be rendered: {_first_line(error.__cause__ or error)}") from error
    if _USER_MARK not in text:
        raise ModelError(f"{name} drops the user's turn: it has to write message['content'] of every message")


def _not_loaded(path: str, directory: Path | None, error: Exception) -> str:
    if directory is None:
        return (
            f"model {path}: neither a directory here nor a model that the hub or its cache gives; model.path is a "
            f"directory, or a hub name where the hub can be reached ({_first_line(error)})"
        )
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        names = ", ".join(_TOKENIZER_FILES)
        return f"model {path} has no tokenizer: none of {names} is in it; copy the base model's there"
    return f"model {path}: its tokenizer cannot be loaded: {_first_line(error)}"


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _names(presets: Mapping[str, object]) -> str:
    return ", ".join(presets)


def _nearest(name: str, presets: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, presets, n=1)
    return (f", did you mean {near[0]!r}?" if near else ":") + f" there are {_names(presets)}"
