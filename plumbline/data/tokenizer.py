"""A model's tokenizer, read in one way by everyone: training, rollouts, rewards, doctor and the endpoint.

Importing this module imports neither transformers nor torch: `read_tokenizer` does.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline.config.pipelines import RewardModel
from plumbline.config.tree import Config
from plumbline.errors import ModelError
from plumbline.records import Message
from plumbline.submitted import left_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_USER_MARK = "plumbuserline"  # no word of any template: found in a rendering, the template kept it


def run_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer of `model`, with a chat template where a pipeline renders conversations. Raises ModelError."""
    model, pipelines = config.model, config.pipelines
    renders = any(not isinstance(p, RewardModel) or p.reads == "conversation" for p in pipelines)
    if renders or model.chat_template or model.template_args:
        return load_tokenizer(model.tokenizer_path, model.chat_template, model.template_args)
    return read_tokenizer(model.tokenizer_path)


def load_tokenizer(
    path: str, chat_template: str | None = None, template_args: Mapping[str, Any] | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory, ready to render conversations.

    Args:
        path: a directory with a tokenizer in it. No code from it is run.
        chat_template: None for the tokenizer's own, a name of `TEMPLATES`, or the path of a Jinja file.
        template_args: values of variables that the template reads. They become part of its text, so that whoever
            renders with it, the reader of an exported model too, has them; what a call passes itself comes first.

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
    if not tokenizer.chat_template:
        names = ", ".join(TEMPLATES)
        raise ModelError(
            f"model {path} has no chat template: set model.chat_template to a Jinja file or one of {names}"
        )
    if template_args:
        tokenizer.chat_template = _with_args(tokenizer.get_chat_template(), template_args)
    _check_template(tokenizer, path, chat_template)
    return tokenizer


def read_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory as its tokenizer.json says, with or without a chat template.

    The class that a directory declares is not asked where that file is there: transformers makes an architecture's
    class of the file's vocabulary and its own normaliser and pre-tokenizer, which give other ids over many a file.

    Raises:
        ModelError: no such model, or no tokenizer in it that can be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(path).is_dir():
        raise ModelError(f"model {path}: no such directory{left_out(path)}")
    kind = PreTrainedTokenizerFast if (Path(path) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds here, from OSError to those of its Rust parts
        raise ModelError(_not_loaded(path, error)) from error


def render_text(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    generate: bool = True,
    template_args: Mapping[str, Any] | None = None,
) -> str:
    """A conversation by the chat template, up to where the answer begins if it is to `generate` one.

    Raises:
        ModelError: the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(
            _plain(messages), tokenize=False, add_generation_prompt=generate, **(template_args or {})
        )
    except Exception as error:  # Jinja runs the template's code: it can fail as any code can
        roles = ", ".join(turn.role for turn in messages)
        raise ModelError(f"the chat template refuses the turns ({roles}): {first_line(error)}") from error
    assert isinstance(text, str)
    return text


def render_texts(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Message]], *, generate: bool = True
) -> list[str]:
    """`render_text` of several. Raises ModelError: the template refuses one."""
    if not conversations:
        return []
    turns: Any = [_plain(messages) for messages in conversations]
    try:
        texts: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    except Exception:  # which of them, and why
        return [render_text(tokenizer, messages, generate=generate) for messages in conversations]
    return texts


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


def template_variables(template: str) -> list[str]:
    """Names that a chat template reads and that are a caller's to set, such as ``enable_thinking``."""
    from transformers.utils.chat_template_utils import _get_template_variables

    ours = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "tools", "documents"}
    return sorted(name for name in _get_template_variables(template) - ours if not name.endswith("_token"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; its type where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error line: which known name was most likely meant, and which there are."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return (f", did you mean {near[0]!r}?" if near else ":") + f" there are {', '.join(known) or 'none'}"


def _with_args(template: str, args: Mapping[str, Any]) -> str:
    known = template_variables(template)
    for name in args:
        if name not in known:
            raise ModelError(
                f"model.template_args: {name} is nothing that the chat template reads{nearest(name, known)}"
            )
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in args.items()}
    sets = "".join(f"{{%- set {name} = {name} if {name} is defined else {value} %}}" for name, value in values.items())
    return template if template.startswith(sets) else f"{sets}\n{template}"  # Jinja drops the line's end


def _template_text(chat_template: str) -> str:
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template]
    file = Path(chat_template).expanduser()
    if not file.is_file():
        near = nearest(chat_template, TEMPLATES)
        raise ModelError(f"model.chat_template {chat_template!r} is neither a file nor a built-in name{near}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"model.chat_template {chat_template}: not UTF-8 at byte {error.start}") from error


def _check_template(tokenizer: "PreTrainedTokenizerBase", path: str, chat_template: str | None) -> None:
    """Renders one turn, so that a template that cannot be used is refused before anything runs."""
    name = f"chat template {chat_template}" if chat_template else f"the chat template of model {path}"
    try:
        text = render_text(tokenizer, [Message(role="user", content=_USER_MARK)])
    except ModelError as error:
        raise ModelError(f"{name} cannot be rendered: {first_line(error.__cause__ or error)}") from error
    if _USER_MARK not in text:
        raise ModelError(f"{name} drops the user's turn: it has to write message['content'] of every message")


def _not_loaded(path: str, error: Exception) -> str:
    if not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        names = ", ".join(TOKENIZER_FILES)
        return f"model {path} has no tokenizer: none of {names} is in it; copy the base model's there"
    return f"model {path}: its tokenizer cannot be loaded: {first_line(error)}"
