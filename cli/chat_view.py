"""How `plumbline chat` shows answers while they come: in columns, or below one another. `cli.chat` opens the views."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.box import MINIMAL
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.chat_client import Answer

NARROWEST_COLUMN = 32  # characters; below that, columns read worse than answers below one another


class Screen(Console):
    """A console that adds nothing to text, and leaves a closed pipe to `cli.main`, as `print` would."""

    def __init__(self, **how: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, soft_wrap=True, **how)

    def on_broken_pipe(self) -> None:
        """What rich does where it met that error; there, exiting with 1 is the default."""
        raise BrokenPipeError

    def write(self, text: str) -> None:
        """Exactly `text`, at once."""
        self.file.write(text)
        self.file.flush()

    def tell(self, text: str) -> None:
        """A word of the client's own, dim beside what the models say."""
        self.print(Text(text, "dim"))


def view(screen: Screen, answers: Sequence[Answer], bare: bool) -> AbstractContextManager[Callable[[], None]]:
    """Shows `answers` as they change; gives the function to call after a change. `bare`: text alone, without titles."""
    columns = screen.is_terminal and not screen.is_dumb_terminal and screen.width // len(answers) >= NARROWEST_COLUMN
    return _beside(screen, answers) if columns and len(answers) > 1 else _below(screen, answers, bare)


@contextmanager
def _below(screen: Screen, answers: Sequence[Answer], bare: bool) -> Iterator[Callable[[], None]]:
    """One below another: the first that is not finished is written as it comes, a later one when it is its turn."""

    def write() -> Iterator[None]:
        """Writes what there is, and yields wherever there is no more yet."""
        for answer in answers:
            while not (answer.opened or answer.finished):
                yield
            if answer.opened and not bare:
                screen.print(_title(answer))
            written = 0
            while True:
                finished, text = answer.finished, answer.text[written:]
                if text:
                    screen.write(text)
                    written += len(text)
                if finished:
                    break
                yield
            if answer.text and not answer.text.endswith("\n"):
                screen.write("\n")
            if answer.note and not bare:
                screen.tell(f"[{answer.note}]")
            if answer.opened and not bare:
                screen.write("\n")

    writer = write()
    yield lambda: next(writer, None)


@contextmanager
def _beside(screen: Screen, answers: Sequence[Answer]) -> Iterator[Callable[[], None]]:
    """In columns. While they grow, only the last lines that fit the screen are seen; at the end all stays there."""
    tails = Live(
        get_renderable=lambda: _columns(
            screen, answers, screen.height - 4
        ),  # the head's two lines, the cursor's, one free
        console=screen,
        transient=True,
        refresh_per_second=10,
    )
    with tails:
        yield lambda: None  # the live view looks by itself
    screen.print(_columns(screen, answers), soft_wrap=False)


def _columns(screen: Screen, answers: Sequence[Answer], lines: int | None = None) -> Table:
    """A column an answer, all of one width, with no more than the last `lines`."""
    width = (screen.width - len(answers) + 1) // len(answers) - 2
    table = Table(box=MINIMAL, show_edge=False, header_style="")
    cells = []
    for answer in answers:
        table.add_column(_title(answer), width=width, overflow="fold")
        text = Text(answer.text.rstrip())
        if answer.error or answer.note:
            text.append(("\n" if answer.text else "") + f"[{'failed' if answer.error else answer.note}]", "dim")
        wrapped = text.wrap(screen, width, overflow="fold")
        cells.append(Text("\n").join(wrapped[-lines:] if lines else wrapped))
    table.add_row(*cells)
    return table


def _title(answer: Answer) -> Text:
    """The model, and the version that answered where the server says it and the name does not."""
    version = f" · {answer.version}" if answer.version not in ("", answer.model) else ""
    return Text.assemble((answer.model, "bold cyan"), (version, "dim"))
