"""`plumbline chat`: a terminal client of any OpenAI-compatible server, with one model or several side by side.

`cli.main` calls `chat`. Text streams as it comes. Several models get the same message, each goes on with a history of
its own, and their answers stand in columns, or below one another where there is no terminal or it is too narrow.
"""

import argparse
import asyncio
import io
import math
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletionMessageParam

from cli.chat_client import Answer, Client, Key
from cli.chat_view import Screen, view
from plumbline.errors import PlumblineError, UserError

DEFAULT_URL = "http://127.0.0.1:8000/v1"
HELP = """\
/models         the models of the server; those that answer are marked
/model NAME     go on with this model alone
/beside NAME    let this model answer too, side by side; once more takes it away
/system TEXT    a system text before every conversation; without TEXT there is none
/clear          forget the conversation
/quit           end, as Ctrl-D does; Ctrl-C stops an answer
A message that begins with / needs a blank before it."""


def chat(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Raises UserError, and RunError for what `--ask` could not get."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # one odd byte or character does not end a conversation
    if options.temperature is not None and not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise UserError(f"--temperature {options.temperature:g}: it should be 0 or more")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"--max-tokens {options.max_tokens}: it should be 1 or more")
    if twice := [name for name in options.model if options.model.count(name) > 1]:
        raise UserError(f"--model {twice[0]}: it is named twice; name each model once")
    if options.ask is not None and not options.ask.strip():
        raise UserError("--ask: there is no text to ask")
    url = options.url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
    client = Client(url, read_key(options.key_file), options.temperature, options.max_tokens)
    with asyncio.Runner() as runner:
        session = Session(client, runner.run, options.model, options.system)
        try:
            return session.ask_once(options.ask) if options.ask is not None else session.converse()
        except KeyboardInterrupt:
            return 130
        finally:
            runner.run(client.close())


def read_key(path: Path | None) -> Key:
    """The first line of the file that is neither blank nor a comment, else OPENAI_API_KEY, else none.

    Raises UserError, which names the file or the variable and never what is in it.
    """
    if path is None:
        source, lines = "OPENAI_API_KEY", [os.environ.get("OPENAI_API_KEY", "")]
    else:
        source = f"--key-file {path}"
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{source}: it should be a text file that holds a key") from None
        except OSError as error:
            raise UserError(f"{source}: it cannot be read: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        if path is None:
            return Key()
        raise UserError(f"{source}: there is no key in it")
    if not (keys[0].isascii() and keys[0].isprintable()) or " " in keys[0]:
        raise UserError(f"{source}: a key should be visible ASCII characters without blanks")
    return Key(keys[0], source)


class Session:
    """The models that are talked to, and what each of them and the user said."""

    def __init__(
        self, client: Client, run: Callable[[Coroutine[Any, Any, Any]], Any], models: Sequence[str], system: str | None
    ) -> None:
        """`run` runs a coroutine to its end, and raises KeyboardInterrupt where Ctrl-C cancelled it."""
        self._client = client
        self._run = run
        self._histories: dict[str, list[ChatCompletionMessageParam]] = {model: [] for model in models}
        self._system = system
        self._screen = Screen()
        self._errors = Screen(stderr=True)

    def ask_once(self, text: str) -> int:
        """Ask `text`, show the answers and nothing else; raises the error of a model that has none.

        A single answer has no title where a program reads it.
        """
        models = self._models()
        errors, stopped = self._ask(text, bare=len(models) == 1 and not self._screen.is_terminal)
        for error in errors[:-1]:
            self._complain(error)
        if errors:
            raise errors[-1]
        return 130 if stopped else 0

    def converse(self) -> int:
        """Read messages and commands until the input ends. Errors are told, and the conversation goes on."""
        prompted = sys.stdin.isatty() and self._screen.is_terminal
        if prompted:
            with suppress(ImportError):
                import readline  # noqa: F401  its import alone lets `input` edit lines
            self._screen.tell(f"{self._client.place} · /help lists the commands, Ctrl-D ends")
            try:
                self._models()
            except PlumblineError as error:
                self._complain(error)  # the server may be starting: the next message finds it
        while True:
            try:
                line = input(f"{' | '.join(self._histories)}> " if prompted else "")
                if line.strip() == "/quit":
                    return 0
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    for error in self._ask(line)[0]:
                        self._complain(error)
            except EOFError:
                if prompted:
                    self._screen.write("\n")
                return 0
            except KeyboardInterrupt:
                if not prompted:
                    raise
                self._screen.write("\n")
                self._screen.tell("Ctrl-D or /quit ends")
            except PlumblineError as error:
                self._complain(error)

    def _complain(self, error: PlumblineError) -> None:
        self._errors.print(f"plumbline: {error}")

    def _models(self) -> list[str]:
        """Who answers; the server's first model where none was named."""
        if not self._histories:
            self._histories[self._run(self._client.models())[0]] = []
        return list(self._histories)

    def _ask(self, text: str, bare: bool = False) -> tuple[list[PlumblineError], bool]:
        """Ask all models at once and show their answers; what came of them goes into the histories.

        Returns what went wrong, what the user can put right last, and whether Ctrl-C stopped it.
        """
        asked: ChatCompletionMessageParam = {"role": "user", "content": text}
        system: list[ChatCompletionMessageParam] = [{"role": "system", "content": self._system}] if self._system else []
        answers = [Answer(model) for model in self._models()]
        stopped = False
        with view(self._screen, answers, bare) as update:

            async def stream() -> None:
                await asyncio.gather(
                    *(
                        self._client.answer(answer, [*system, *self._histories[answer.model], asked], update)
                        for answer in answers
                    )
                )

            try:
                self._run(stream())
            except KeyboardInterrupt:
                stopped = True
        for answer in answers:
            if answer.text:
                self._histories[answer.model] += [asked, {"role": "assistant", "content": answer.text}]
        errors = {str(answer.error): answer.error for answer in answers if answer.error}  # the same line only once
        return sorted(errors.values(), key=lambda error: isinstance(error, UserError)), stopped

    def _command(self, line: str) -> None:
        """Do what `line` says; raises UserError for a command that is none."""
        command, _, value = line.strip().partition(" ")
        value = value.strip()
        if command in ("/model", "/beside") and not value:
            raise UserError(f"{command}: name a model, such as {command} ple; /models lists them")
        match command:
            case "/help":
                self._screen.tell(HELP)
            case "/models":
                for model in self._run(self._client.models()):
                    self._screen.tell(f"{'*' if model in self._histories else ' '} {model}")
            case "/model":
                self._histories = {value: self._history_for(value)}
                self._tell_models()
            case "/beside":
                self._beside(value)
                self._tell_models()
            case "/system":
                self._system = value
                self._screen.tell(f"system: {value or 'none'}")
            case "/clear":
                self._histories = {model: [] for model in self._histories}
                self._screen.tell("the conversation is forgotten")
            case _:
                raise UserError(f"{command}: no such command; /help lists them, and a message may begin with a blank")

    def _history_for(self, model: str) -> list[ChatCompletionMessageParam]:
        """A model that joins goes on with the first one's conversation."""
        return list(self._histories.get(model) or next(iter(self._histories.values()), []))

    def _beside(self, model: str) -> None:
        if model not in self._models():
            self._histories[model] = self._history_for(model)
        elif len(self._histories) > 1:
            del self._histories[model]
        else:
            raise UserError(f"/beside {model}: nobody else answers; name another model, or go on with one by /model")

    def _tell_models(self) -> None:
        self._screen.tell(f"now: {' | '.join(self._histories)}")
