"""Errors in the form that OpenAI's server gives them, so that its clients raise what their users expect."""

import json
from typing import Any


class ApiError(Exception):
    """An answer that is an error: its HTTP status and OpenAI's fields."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
        self.body = {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def error_type(status: int) -> str:
    """OpenAI's name of a kind of error."""
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def unknown_model(name: str) -> ApiError:
    """There is no such model, or version of one."""
    return ApiError(404, f"The model `{name}` does not exist.", code="model_not_found", param="model")


def lost_model(name: str) -> ApiError:
    """There is such a name, and what it means is not there any more."""
    return ApiError(503, f"The version that `{name}` means is not on this server; its operator must put it back.")


def unfit_model(name: str) -> ApiError:
    """Its files are there, and no engine can answer from them as the version that they should be."""
    return ApiError(503, f"`{name}` does not load on this server as what was published; its operator must put it back.")


def from_engine(status: int, body: str) -> ApiError:
    """What an engine refused, whose own fields are vLLM's."""
    said: dict[str, Any] = json.loads(body).get("error", {})
    message = str(said.get("message") or "the engine gave no reason")
    if status >= 500:
        return ApiError(status, "The engine failed on this request; it is in the server's log.")
    too_long = "context length" in message
    return ApiError(status, message, code="context_length_exceeded" if too_long else None, param=said.get("param"))
