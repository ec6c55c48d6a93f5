"""The service's HTTP face: nothing without the token, bounded bodies, one forward at a time, one line for what is wrong."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from oprd.serving.host import Host
from oprd.serving.wire import CHECKSUM, MOST_QUESTION_BYTES, TEACHER, Refused

logger = logging.getLogger(__name__)

MOST_PROJECTION_BYTES = 2 * 2**30
MOST_WAITING = 64  # requests with a body; further ones are told to come again
BODY_SECONDS = 300.0
MOST_PASSED_OVER, PASSED_OVER_SECONDS = 2**20, 5.0
TENSORS = "application/octet-stream"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guarded:
    """An application of which nothing is seen without ``Authorization: Bearer TOKEN``: whatever the path and method, the
    answer is 401. With it, every answer names the teacher."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str, teacher: str) -> None:
        self._app, self._teacher = app, teacher.encode()
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        matches = hmac.compare_digest(given[0] if given else b"", self._expected)  # in constant time
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif matches and len(given) == 1:

            async def named(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (TEACHER.encode(), self._teacher)]
                await send(message)

            await self._app(scope, receive, named)
        else:
            await _pass_over(receive)
            headers = {"www-authenticate": "Bearer", "connection": "close"}
            await JSONResponse({"error": "no valid token"}, 401, headers)(scope, receive, send)


async def _pass_over(receive: Receive) -> None:
    """Read a body that nobody wants, up to a bound: who closes a connection with bytes unread takes his answer back."""
    left = MOST_PASSED_OVER
    with suppress(TimeoutError):
        async with asyncio.timeout(PASSED_OVER_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


class Service:
    """The routes of one `Host`, and the queue in front of it."""

    def __init__(self, host: Host, *, most_projection_bytes: int = MOST_PROJECTION_BYTES) -> None:
        self._host, self._most_projection_bytes = host, most_projection_bytes
        self._worker = ThreadPoolExecutor(1, "teacher")
        self._turn, self._waiting, self._is_stopping = asyncio.Lock(), 0, False

    def app(self, token: str) -> Guarded:
        """The whole application."""
        routes = [
            Route("/v1/teacher", self._of(self._about), methods=["GET"]),
            Route("/v1/files/{name}", self._of(self._file), methods=["GET"]),
            Route("/v1/head", self._of(self._head), methods=["GET"]),
            Route("/v1/projections/{digest}", self._of(self._keep), methods=["PUT"]),
            Route("/v1/states", self._of(self._states), methods=["POST"]),
        ]
        handlers = {HTTPException: _http_error}
        return Guarded(Starlette(routes=routes, exception_handlers=handlers), token, self._host.about["teacher"])

    def stop(self) -> None:
        """From now on only the forward in progress is finished; those that wait are told to come again."""
        self._is_stopping = True

    def _of(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except Refused as error:
                return _error(error.status, str(error))
            except ClientDisconnect:
                return Response(status_code=400)  # that nobody reads
            except Exception:  # whatever it is, the service lives on and its inside stays inside
                logger.exception("A request failed.")
                return _error(500, "internal error; the service's log says more")

        return guarded

    async def _about(self, request: Request) -> Response:
        return JSONResponse(self._host.about)

    async def _file(self, request: Request) -> Response:
        content = self._host.files.get(request.path_params["name"])
        if content is None:
            raise Refused(404, "no such file; those that are there are in /v1/teacher")
        return _tensors(content)

    async def _head(self, request: Request) -> Response:
        return _tensors(*await self._run(request, self._host.head))

    async def _keep(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise Refused(422, "a projection is named by its sha256")

        def keep(body: bytes) -> bytes:
            self._host.keep_projection(digest, body)
            return b""

        await self._run(request, keep, self._most_projection_bytes)
        return Response(status_code=204)

    async def _states(self, request: Request) -> Response:
        parameters = dict(request.query_params)

        def ask(body: bytes) -> bytes:
            return self._host.answer(body, parameters)

        return _tensors(*await self._run(request, ask, MOST_QUESTION_BYTES))

    async def _run(self, request: Request, work: Callable[..., bytes], most_bytes: int = 0) -> tuple[bytes, str]:
        """``work`` of the request's body (without one for ``most_bytes=0``) in the worker thread, in the order of arrival;
        its result and sha256."""
        if self._waiting >= MOST_WAITING:
            raise Refused(503, "too many requests wait")
        self._waiting += 1
        try:
            arguments = (await _body(request, most_bytes),) if most_bytes else ()
            async with self._turn:  # first come, first served
                if self._is_stopping:
                    raise Refused(503, "the service stops")
                if await request.is_disconnected():
                    raise ClientDisconnect

                def work_and_sum() -> tuple[bytes, str]:
                    result = work(*arguments)
                    return result, hashlib.sha256(result).hexdigest()

                return await asyncio.get_running_loop().run_in_executor(self._worker, work_and_sum)
        finally:
            self._waiting -= 1


async def _body(request: Request, most_bytes: int) -> bytes:
    """The request's body.

    Raises:
        Refused: 413 beyond ``most_bytes``, of which nothing is kept where its length is declared; 408 if it does not come.
    """
    declared = request.headers.get("content-length", "0")
    allowed = most_bytes if declared.isdecimal() and int(declared) <= most_bytes else -1
    content, seen, goes_on = bytearray(), 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while goes_on and seen <= allowed + MOST_PASSED_OVER:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                goes_on = message.get("more_body", False)
                seen += len(message.get("body", b""))
                if seen <= allowed:
                    content += message.get("body", b"")
    except TimeoutError as error:
        raise Refused(408, "the body did not come in time") from error
    if seen > allowed:
        raise Refused(413, f"the body may have {most_bytes:,} bytes")
    return bytes(content)


def _tensors(content: bytes, digest: str | None = None) -> Response:
    digest = digest or hashlib.sha256(content).hexdigest()
    return Response(content, media_type=TENSORS, headers={CHECKSUM: digest})


def _error(status: int, reason: str) -> JSONResponse:
    headers = {"retry-after": "1"} if status == 503 else {}
    if status in (408, 413):  # the rest of the body is not read
        headers["connection"] = "close"
    return JSONResponse({"error": reason}, status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _error(status, "no such path" if status == 404 else "no such method there" if status == 405 else "refused")
