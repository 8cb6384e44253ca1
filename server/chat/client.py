"""One server over HTTP: its models, and answers as they are generated. Standard library only: it starts at once."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_BYTES = 64 * 1024

Json = dict[str, Any]


class ChatError(Exception):
    """The server cannot be reached, or refused; the message is one line for the person at the terminal."""


class ChatClient:
    """Speaks to the server at `url` (its root, without `/v1`). Every call is a connection of its own."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url
        self._parts = urlsplit(url)
        self._headers = {"Accept": "application/json, text/event-stream", "User-Agent": "outpace-chat"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """The names of the models that the server lists. Raises ChatError."""
        connection = self._connect()
        try:
            with self._ask(connection, "GET", "/v1/models") as response:
                listed = json.loads(response.read())
            return [str(model["id"]) for model in listed["data"]]
        except (ValueError, LookupError, TypeError):
            raise ChatError(f"{self._url} answers, but does not speak OpenAI's API; is the URL right?") from None
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"the connection to {self._url} broke: {_reason(error)}") from error
        finally:
            connection.close()

    def stream(self, body: Json) -> Generator[Json, None, None]:
        """The chunks of a streamed chat completion. Closing the generator closes the connection, which cancels it.

        Raises ChatError, also for an error that the server sends within the stream.
        """
        connection = self._connect()
        try:
            with self._ask(connection, "POST", "/v1/chat/completions", {**body, "stream": True}) as response:
                yield from _events(response)
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"the connection to {self._url} broke: {_reason(error)}") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        parts = self._parts
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise ChatError(f"the certificate of {self._url} is not trusted: {error.verify_message}") from error
        except OSError as error:
            raise ChatError(f"no server at {self._url}: {_reason(error)}; `outpace serve` starts one") from error
        sock: socket.socket = connection.sock
        sock.settimeout(None)  # a long prompt takes what it takes, and Ctrl-C always works
        return connection

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Json | None = None
    ) -> http.client.HTTPResponse:
        headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
        payload = None if body is None else json.dumps(body).encode()
        connection.request(method, self._parts.path + path, payload, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ChatError(_refusal(response))
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[Json]:
    """Server-sent events up to `[DONE]`. A stream that ends before it was cut off."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise ChatError("the server sent an event that is no JSON") from None
        if "error" in event:
            raise ChatError(_told(event) or "the server reported an error without saying which")
        yield event
    raise ChatError("the server closed the connection before the answer was complete")


def _refusal(response: http.client.HTTPResponse) -> str:
    try:
        told = _told(json.loads(response.read(MAX_ERROR_BYTES)))
    except ValueError:
        told = None
    text = f"the server answers {response.status}: {told or response.reason}"
    return f"{text} (--api-key or OUTPACE_API_KEY sets the key)" if response.status == 401 else text


def _told(body: Any) -> str | None:
    """The message of an error in OpenAI's shape, on one line."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message).split()) if message else None


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came within {CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
