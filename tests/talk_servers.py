"""A server of talkers in a thread, and a plain client of the standard library for it."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from cheaptrain.talk.server import listen

_COMPLETIONS = "/v1/chat/completions"


@dataclass(frozen=True)
class Server:
    """Where it listens, and ways to ask it."""

    port: int

    def get(self, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
        """Status and body."""
        with self._connection() as connection:
            connection.request("GET", path, headers={"Host": host})
            reply = connection.getresponse()
            return reply.status, reply.read()

    def raw(self, body: bytes, content_type: str) -> tuple[int, Any]:
        """Status and JSON answer to a chat completion with this very body."""
        with self._connection() as connection:
            connection.request("POST", _COMPLETIONS, body, {"Content-Type": content_type})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def post(self, request: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON answer to a chat completion."""
        return self.raw(json.dumps(request).encode(), "application/json")

    def stream(self, request: dict[str, Any]) -> list[str]:
        """The data of all events of a streamed completion."""
        with self._connection() as connection:
            connection.request("POST", _COMPLETIONS, json.dumps(request), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert reply.status == 200
            assert reply.headers["Content-Type"].startswith("text/event-stream")
            events = reply.read().decode().split("\n\n")
            assert events.pop() == ""
            return [event.removeprefix("data: ") for event in events]

    def open(self, request: dict[str, Any]) -> socket.socket:
        """Send a request and read nothing; closing the socket is what a client does that goes away."""
        body = json.dumps(request).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {_COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            yield connection
        finally:
            connection.close()


@contextlib.contextmanager
def running(app: Any) -> Iterator[Server]:
    """Serve `app` in a thread on a free port of loopback."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Server(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
