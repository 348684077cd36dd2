"""`cheaptrain serve`: one page to talk to one or two checkpoints, and an OpenAI-compatible API behind it.

Starlette and uvicorn carry it. `transformers serve` was looked at first and does not fit: it loads, and fetches, any
model a request names; it renders text that looks like a special token as that token; it takes frequency_penalty for a
repetition penalty; an answer that ends by itself on its last allowed token is called cut; and it has no page. What it
is built on, `generate`, is used here as well.

A model answers one request at a time, the others wait in line. The traps: a client that goes away must not keep the
model busy, waiting or answering; and any page in the same browser can reach a server on loopback, so requests must come
under a name of this machine and as application/json, which other sites cannot send without being allowed to.
"""

import asyncio
import base64
import hashlib
import ipaddress
import re
import socket
import threading
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cheaptrain.errors import PreflightError
from cheaptrain.say import say
from cheaptrain.talk import api
from cheaptrain.talk.answer import Answer, Sampling, answer
from cheaptrain.talk.prompt import PromptError, encode
from cheaptrain.talk.talker import Talker, load_talkers
from cheaptrain.talk.visible import visible

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

_LONGEST_BODY_BYTES = 4 * 2**20
_POLL_SECONDS = 0.2
_ROOM_WITHOUT_POSITIONS = 4096  # an answer's limit where neither the request nor the model has one


def serve(path: str, against: str | None, host: str, port: int, console: Console) -> None:
    """Serve the checkpoint at `path`, and `against` beside it, until Ctrl-C. `port` 0: any free one.

    Raises PreflightError when the packages of the extra `serve` are missing or the address cannot be had, and what
    `load_talkers` raises.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise PreflightError("serving needs two more packages: pip install 'cheaptrain[serve]'") from error
    listener = listen(host, port)  # before the weights are read: a port that is taken shows at once
    with listener:
        talkers = load_talkers(path, against, lambda text: say(console, visible(text)))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        if not is_loopback(host):
            say(console, f"anyone who reaches {host} can use this server: it asks for no password", style="bold yellow")
        say(console, f"page: {address}   API: {address}/v1   Ctrl-C ends")
        app = make_app(talkers, any_host=not is_loopback(host))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn hands it on after it has ended in good order
            say(console, "stopped")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises PreflightError saying what is in the way."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PreflightError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port (0: any free one) or --host"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(talkers: Sequence[Talker], *, any_host: bool = False) -> "Starlette":
    """The application: page, API, and errors in OpenAI's form. `any_host` answers under any name."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route

    lines = {talker.name: asyncio.Lock() for talker in talkers}
    page, headers = load_page()

    async def show_page(_: "Request") -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    async def health(_: "Request") -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def models(_: "Request") -> JSONResponse:
        return JSONResponse(api.list_models(talkers))

    async def complete(request: "Request") -> Any:
        asked = api.parse_request(await _read(request))
        talker = api.choose(talkers, asked.model)
        try:
            ids = encode(talker, asked.conversation())
        except PromptError as error:
            raise api.prompt_refused(error) from error
        room = _ROOM_WITHOUT_POSITIONS if talker.positions is None else talker.positions - len(ids)
        parts = _parts(talker, lines[talker.name], ids, asked.sampling(room), request.is_disconnected)
        completion = api.Completion(talker.name)
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _events(completion, parts, with_usage=with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with aclosing(parts):
            async for part in parts:
                if isinstance(part, Answer):
                    return JSONResponse(completion.whole(part))
        raise api.ApiError(499, "the client went away")  # nobody reads it

    async def refused(_: "Request", error: Exception) -> JSONResponse:
        assert isinstance(error, api.ApiError)
        return JSONResponse(error.body(), status_code=error.status)

    async def not_here(request: "Request", error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        told = api.ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(told.body(), status_code=error.status_code, headers=error.headers)

    async def failed(_: "Request", error: Exception) -> JSONResponse:
        return JSONResponse(_failure(error).body(), status_code=500)  # uvicorn prints the traceback

    hosts = ["*"] if any_host else ["localhost", "127.0.0.1", "[::1]", "::1"]
    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={api.ApiError: refused, HTTPException: not_here, Exception: failed},
    )


def load_page() -> tuple[str, dict[str, str]]:
    """The page and the headers it goes out with: only its own script runs, and it talks to nobody but this server."""
    page = files("cheaptrain.talk").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {
        tag: base64.b64encode(hashlib.sha256(_inside(page, tag).encode()).digest()).decode()
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


async def _parts(
    talker: Talker, line: asyncio.Lock, ids: list[int], sampling: Sampling, gone: Callable[[], Awaitable[bool]]
) -> AsyncGenerator[str | Answer]:
    """Pieces of the answer as they come, and the answer; nothing more once the client is `gone`.

    However this ends, the generation ends with it, after the token it is at; one still in line never begins.
    """
    loop = asyncio.get_running_loop()
    parts: asyncio.Queue[str | Answer | Exception] = asyncio.Queue()
    cancelled = threading.Event()

    def put(part: str | Answer | Exception) -> None:
        loop.call_soon_threadsafe(parts.put_nowait, part)

    def work() -> None:
        try:
            put(answer(talker, ids, sampling, put, cancelled))
        except Exception as error:
            put(error)

    async def wait_and_work() -> None:
        async with line:
            if not cancelled.is_set():
                await loop.run_in_executor(None, work)

    waiting = asyncio.create_task(wait_and_work())
    try:
        while not await gone():
            try:
                part = await asyncio.wait_for(parts.get(), _POLL_SECONDS)
            except TimeoutError:
                continue
            if isinstance(part, Exception):
                raise part
            yield part
            if isinstance(part, Answer):
                await waiting
                return
    finally:
        cancelled.set()


async def _events(
    completion: api.Completion, parts: AsyncGenerator[str | Answer], *, with_usage: bool
) -> AsyncGenerator[str]:
    yield completion.chunk({"role": "assistant", "content": ""})
    try:
        async with aclosing(parts):
            async for part in parts:
                if isinstance(part, str):
                    yield completion.chunk({"content": part})
                    continue
                yield completion.chunk({}, api.finish_reason(part))
                if with_usage:
                    yield completion.usage_chunk(part)
                yield "data: [DONE]\n\n"
    except Exception as error:  # the head has gone out: the stream itself has to say it
        traceback.print_exception(error)
        yield api.event(_failure(error).body())


async def _read(request: "Request") -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise api.ApiError(415, "send the request as Content-Type: application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_BODY_BYTES:
            raise api.ApiError(413, f"the request is longer than {_LONGEST_BODY_BYTES:,} bytes")
    return body


def _failure(error: Exception) -> api.ApiError:
    return api.ApiError(500, f"{type(error).__name__}: {error}")


def _inside(page: str, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert found is not None
    return found.group(1)
