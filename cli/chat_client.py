"""Asks any OpenAI-compatible server for answers, and turns what may go wrong there into one line. `cli.chat` calls it.

The key goes into requests and nowhere else: no line made here holds it, not even where a server repeats it.
"""

import asyncio
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletionMessageParam

from plumbline.errors import PlumblineError, RunError, UserError, in_one_line

VERSION_HEADER = "x-plumbline-version"
NO_KEY = "none"  # the openai package wants a key where the server wants none
LONGEST_QUOTE = 300  # characters of a server's own words


@dataclass(slots=True)
class Answer:
    """One model's answer while it comes: `opened` with the response's head, `finished` whichever way it ended.

    Attributes:
        text: what came so far, fit for a terminal.
        version: what the server says answered, such as `ple@12`; empty where it does not say.
        note: why the text is not all that the model had to say; empty where it is.
        error: what went wrong; there may be text before it.
    """

    model: str
    text: str = ""
    version: str = ""
    note: str = ""
    error: PlumblineError | None = None
    opened: bool = False
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """An API key, and where it came from, which is what messages say of it."""

    value: str = field(default=NO_KEY, repr=False)
    source: str = ""


def printable(text: str) -> str:
    """`text` without control characters and lone surrogates: no text of a server's can command the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


class Client:
    """One server, with the settings that every request to it has."""

    def __init__(self, url: str, key: Key, temperature: float | None = None, max_tokens: int | None = None) -> None:
        """Raises UserError for an address that none can be reached at. Connects to nothing yet."""
        self.place = _place(url)
        self._key = key
        # No retries: who waits for an answer wants to know what is wrong, not to look at nothing for a minute.
        self._openai = openai.AsyncOpenAI(base_url=url, api_key=key.value, max_retries=0)
        settings = {"temperature": temperature, "max_tokens": max_tokens}
        self._settings: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    async def models(self) -> list[str]:
        """Names of the server's models, at least one; raises UserError or RunError."""
        try:
            # Raw, for the package takes a page of anything for a list of models and fails within itself.
            listed = (await self._openai.models.with_raw_response.list()).http_response.json()
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        except ValueError:  # no JSON
            raise self._no_list() from None
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = [printable(str(entry["id"])) for entry in entries or [] if isinstance(entry, dict) and "id" in entry]
        if not names:
            raise self._no_list()
        return names

    async def answer(
        self, answer: Answer, messages: Sequence[ChatCompletionMessageParam], update: Callable[[], None]
    ) -> None:
        """Stream the model's answer to `messages` into `answer`, calling `update` whenever there is more of it.

        Errors go into the answer, so that of several models one may fail alone. Cancelled, it closes the connection,
        which is how a server learns that nobody listens any more, and keeps what came.
        """
        try:
            await self._stream(answer, messages, update)
        except asyncio.CancelledError:
            answer.note = "stopped"
            raise
        except openai.NotFoundError as error:
            answer.error = await self._not_found(error, answer.model)
        except (openai.OpenAIError, json.JSONDecodeError, UnicodeError) as error:
            answer.error = self._explained(error, begun=answer.opened)
        finally:
            answer.finished = True
            update()

    async def _stream(
        self, answer: Answer, messages: Sequence[ChatCompletionMessageParam], update: Callable[[], None]
    ) -> None:
        ended = None
        stream = await self._openai.chat.completions.create(
            model=answer.model, messages=list(messages), stream=True, **self._settings
        )
        async with stream:
            answer.version = printable(stream.response.headers.get(VERSION_HEADER, ""))
            answer.opened = True
            update()
            async for chunk in stream:
                for choice in getattr(chunk, "choices", None) or []:  # a chunk of usage has none
                    answer.text += printable((choice.delta and choice.delta.content) or "")
                    ended = choice.finish_reason or ended
                update()
        if ended is None:
            raise openai.OpenAIError("the stream ended before the answer did")
        if ended == "length":
            answer.note = "ended at the most tokens allowed"
        elif ended != "stop":
            answer.note = f"ended by {printable(ended)}"
        elif not answer.text:
            answer.note = "an empty answer"

    def _no_list(self) -> UserError:
        return UserError(
            f"{self.place}: no list of models comes from there; the address of an OpenAI API usually ends with /v1, "
            "and where it is right, a model can be named by --model"
        )

    async def _not_found(self, error: openai.NotFoundError, model: str) -> PlumblineError:
        """Nearly always an unknown model; where the body is not OpenAI's, the address."""
        if not (isinstance(error.body, dict) and "message" in error.body):
            return UserError(f"{self.place}: no OpenAI API is there (404); its address usually ends with /v1")
        try:
            known = f"it has {', '.join(await self.models())}"
        except PlumblineError:
            known = self._quoted(error)
        return UserError(f"{self.place}: the server has no model {model}; {known}")

    def _explained(self, error: Exception, begun: bool = False) -> PlumblineError:
        """The line for `error`: a UserError where the user can put it right, else a RunError."""
        said = self._quoted(error)
        match error:
            case openai.AuthenticationError() if not self._key.source:
                return UserError(f"{self.place}: the server asks for a key; give it by --key-file or OPENAI_API_KEY")
            case openai.AuthenticationError():
                return UserError(f"{self.place}: the server refuses the key from {self._key.source}")
            case openai.RateLimitError():
                wait = error.response.headers.get("retry-after", "")
                wait = f"in {wait} s" if wait.isdigit() else "later"
                return RunError(f"{self.place}: the server takes no more requests now (429), try again {wait}: {said}")
            case openai.APIStatusError():
                if error.status_code >= 500:
                    return RunError(f"{self.place}: the server failed ({error.status_code}): {said}")
                return UserError(f"{self.place}: the server refuses the request ({error.status_code}): {said}")
            case openai.APITimeoutError():
                return RunError(f"{self.place}: the server gives no answer in time")
            case openai.APIConnectionError() if not begun:
                why = in_one_line(error.__cause__ or error)
                return UserError(f"{self.place}: no server answers there ({why}); start it, or name another by --url")
            case openai.APIConnectionError():
                return RunError(f"{self.place}: the connection broke off in the middle of the answer")
            case json.JSONDecodeError():
                return RunError(f"{self.place}: what comes from there is no JSON, as OpenAI's API would have it")
            case UnicodeError():
                return UserError("the text holds bytes that are no UTF-8")
        return RunError(f"{self.place}: {said}")

    def _quoted(self, error: Exception) -> str:
        """The server's own words on one line, without the key."""
        body = error.body if isinstance(error, openai.APIError) else None
        said = body.get("message") if isinstance(body, dict) else None
        said = " ".join(printable(str(said or error)).split())
        if self._key.source:
            said = said.replace(self._key.value, "***")
        return said if len(said) <= LONGEST_QUOTE else f"{said[:LONGEST_QUOTE]} …"


def _place(url: str) -> str:
    """`url` as messages name it, without name, password or query, which may be secrets."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--url: {error}; it should be such as http://127.0.0.1:8000/v1") from None
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise UserError("--url: it should be an http:// or https:// address, such as http://127.0.0.1:8000/v1")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
