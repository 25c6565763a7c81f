"""What a chat template writes around the texts of a conversation, found once for all conversations of one shape.

A template is a program, and may do with a text whatever it likes: trim it, cut it, ask what it begins with. So it is
run once with texts that end it as soon as it does anything but write them down. If it does not, what it writes depends
on the roles alone, and every other conversation of these roles is the same frame with its own texts in it: no program
is run for each of a million rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, NoReturn

from plumbline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT = {"__add__", "__doc__", "__getattribute__", "__getnewargs__", "__new__", "__radd__", "__sizeof__"}
_MARK = "plumbunreadtext"


@dataclass(frozen=True, slots=True)
class Frame:
    """`between` is what stands before, between and after the texts; `turns` says of which turn each of them is."""

    between: tuple[str, ...]
    turns: tuple[int, ...]

    def around(self, texts: Sequence[str]) -> str:
        """The rendering of a conversation of the frame's shape, by the texts of its turns."""
        parts = [self.between[0]]
        for turn, after in zip(self.turns, self.between[1:], strict=True):
            parts += (texts[turn], after)
        return "".join(parts)


class Looked(BaseException):  # Jinja catches an Exception here and there, and goes on
    """Something was done with an `Unread` text that may depend on what it says."""


class Unread(str):
    """A text that can be put beside others, and nothing else: every other method of `str` raises Looked."""

    __slots__ = ()

    def __add__(self, other: str) -> "Unread":
        return Unread(written(self) + written(other))

    def __radd__(self, other: str) -> "Unread":
        return Unread(written(other) + written(self))


def _raising(name: str) -> Callable[..., NoReturn]:
    def look(*_: Any, **__: Any) -> NoReturn:
        raise Looked(name)

    return look


for _name in {*vars(str), "__int__", "__float__"} - _KEPT:
    setattr(Unread, _name, _raising(_name))


def written(value: Any) -> Any:
    """A value as it is written down: a text's characters."""
    return str.__str__(value) if isinstance(value, str) else value


def unread(roles: Sequence[str]) -> list[Message]:
    """A conversation of these roles whose texts nobody may look at."""
    return [Message(role=role, content=Unread(_word(turn))) for turn, role in enumerate(roles)]


def find_frame(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message]) -> Frame | None:
    """What the chat template writes around the texts of `unread`, up to where an answer begins.

    None where it looks at them, changes one, or refuses the roles: then each conversation is to be rendered.

    Args:
        turns: those of `unread`, with whatever was put beside them.
    """
    try:
        rendering = _probe(tokenizer.get_chat_template()).render(
            **tokenizer.special_tokens_map,
            messages=[{"role": turn.role, "content": turn.content} for turn in turns],
            tools=None,
            documents=None,
            add_generation_prompt=True,
        )
    except (Exception, Looked):  # a template's code can fail as any code can, and then says so of each row
        return None
    return _taken_apart(rendering)


@lru_cache(maxsize=8)
def _probe(template: str) -> Any:
    """The template as transformers compiles it, with a look at what it does. Raises Looked where that cannot be seen.

    What is put together out of sight may be looked at afterwards: blocks whose output is kept, calls and filters. So
    may a text that is looked for in another, by Python's `in`, which asks neither.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Any = _compile_jinja_template(template).environment.overlay(finalize=written)
    kept = (nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Macro)
    tree = environment.parse(template)
    if tree.find(kept) is not None or any(map(_looks_for, tree.find_all(nodes.Compare))):
        raise Looked(template)
    if "strftime_now" in template:  # another text tomorrow
        raise Looked(template)
    environment.filters = {name: _blind(of) for name, of in environment.filters.items()}
    environment.tests = {**environment.tests, **{name: _blind(environment.tests[name]) for name in ("in", "sameas")}}
    environment.call = _blind(environment.call)
    return environment.from_string(template)


def _looks_for(compare: Any) -> bool:
    """Whether a comparison looks for what may be a text in what may be one."""
    from jinja2 import nodes

    lists = (nodes.List, nodes.Tuple)
    inside = [one.expr for one in compare.ops if one.op in ("in", "notin")]
    return not isinstance(compare.expr, nodes.Const) and not all(isinstance(expr, lists) for expr in inside)


def _blind(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which no text may be given, and which may not write one that it found by itself."""

    @wraps(function)
    def blind(*args: Any, **kwargs: Any) -> Any:
        if any(map(_holds, (*args, *kwargs.values()))):
            raise Looked(function)
        result = function(*args, **kwargs)
        if isinstance(result, str) and not isinstance(result, Unread) and _MARK in result:
            raise Looked(function)
        return result

    return blind


def _holds(value: Any) -> bool:
    """Whether a value is a text, or a list of texts."""
    return isinstance(value, Unread) or (isinstance(value, list | tuple) and any(isinstance(v, Unread) for v in value))


def _taken_apart(rendering: str) -> Frame | None:
    """None where a text was changed on its way, or is not there at all."""
    before, *others = rendering.split(_OPEN)
    between, turns = [before], []
    for other in others:
        turn, closed, after = other.partition(_CLOSE)
        if not (closed and turn.isdecimal()):
            return None
        turns.append(int(turn))
        between.append(after)
    whole = bool(turns) and not any(_MARK in part for part in between)
    return Frame(tuple(between), tuple(turns)) if whole else None


# What stands for a turn's text: trimmed, escaped, formatted or in other case, it is no longer there as it was.
_OPEN, _CLOSE = f' \n"{_MARK} é<Ⅷ&\\%s{{}}', f"'\t{_MARK}\" \n "


def _word(turn: int) -> str:
    return f"{_OPEN}{turn}{_CLOSE}"
