"""The routes. Starlette: routing, CORS and little else, kept up to date by many; this
server's bodies are checked by hand anyway, as its errors name fields in OpenAI's words.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_ep.server.answers import Answers
from mlx_ep.server.anthropic import MessagesDialect
from mlx_ep.server.asked import Asked
from mlx_ep.server.body import Body, read_body
from mlx_ep.server.completions import CompletionDialect
from mlx_ep.server.dialect import Dialect
from mlx_ep.server.errors import ApiError
from mlx_ep.server.openai_chat import ChatDialect
from mlx_ep.server.replies import (
    EventStream,
    GoneError,
    read_limited,
    send_json,
    unless_gone,
)
from mlx_ep.server.responses import ResponsesDialect
from mlx_ep.server.service import Access, Service

_log = logging.getLogger("mlx_ep")

DIALECTS: dict[str, type[Dialect]] = {
    "/v1/chat/completions": ChatDialect,
    "/chat/completions": ChatDialect,  # which mlx_lm.server has too
    "/v1/completions": CompletionDialect,
    "/v1/responses": ResponsesDialect,
    "/v1/messages": MessagesDialect,
}
_PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# Nothing but its own files and its own server.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_OPEN = ("/health", *_PAGE)
_ACTIONS: tuple[Literal["start", "stop", "dump"], ...] = ("start", "stop", "dump")


def make_app(make_service: Callable[[], Service], access: Access) -> Starlette:
    """The ASGI application.

    Args:
        make_service: called on the event loop's thread, when the server starts.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.service = service = make_service()
        app.state.started = int(time.time())
        yield
        service.close()

    routes = [
        *(Route(path, _page, methods=["GET"]) for path in _PAGE),
        Route("/health", _health, methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/v1/state", _state, methods=["GET"]),
        Route("/v1/models", _models, methods=["GET"]),
        Route("/v1/models/{name:path}", _model, methods=["GET"]),
        Route("/v1/expert_distribution/{action}", _experts, methods=["POST"]),
        Route("/v1/messages/count_tokens", _CountTokens(access), methods=["POST"]),
        *(
            Route(path, Generation(path, dialect, access), methods=["POST"])
            for path, dialect in DIALECTS.items()
        ),
    ]
    middleware = [Middleware(_Guard, access)]
    if access.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _our_error,  # Starlette raises it again: it is logged
        },
    )


class Generation:
    """An endpoint that generates, as an ASGI application."""

    def __init__(self, path: str, dialect: type[Dialect], access: Access) -> None:
        self._path, self._dialect, self._access = path, dialect, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service: Service = scope["app"].state.service
        dialect = self._dialect(service)
        start = time.perf_counter()
        status: int | str = 200
        answers: Answers | None = None
        try:
            text = await read_limited(receive, scope, self._access)
            async with AsyncExitStack() as stack:
                with service.reading():
                    body = read_body(text)
                    asked = await service.read(lambda: dialect.read(body))
                    name = f"{dialect.prefix}{uuid.uuid4().hex}"
                    answers = Answers(service, asked, name)
                    await stack.enter_async_context(answers)
                await self._answer(dialect, answers, asked, scope, receive, send)
        except GoneError:
            status = "client gone"
        except ApiError as error:
            status = error.status
            headers = {**error.headers}
            if error.status in (408, 413):  # the rest of the body is not read
                headers["connection"] = "close"
            await send_json(send, dialect.error(error), error.status, headers)
        service.metrics.requests.labels(self._path, str(status)).inc()
        counts = (
            f", {answers.prompt_tokens} + {answers.generated} tokens" if answers else ""
        )
        seconds = time.perf_counter() - start
        _log.debug("POST %s: %s%s, %.3f s", self._path, status, counts, seconds)

    async def _answer(
        self,
        dialect: Dialect,
        answers: Answers,
        asked: Asked,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        if not asked.stream:
            await unless_gone(receive, answers.finished())
            await send_json(send, dialect.whole(answers))
            return

        async def events() -> AsyncIterator[bytes]:
            try:
                async with aclosing(dialect.events(answers)) as parts:
                    async for part in parts:
                        yield part
            except ApiError as error:  # the status has been sent
                yield dialect.error_event(error)

        await EventStream(scope, receive, send, self._access).run(events())


class _CountTokens:
    """Anthropic's count of a prompt's tokens."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service: Service = scope["app"].state.service
        dialect = MessagesDialect(service)
        try:
            body = read_body(await read_limited(receive, scope, self._access))
            count = await service.read(lambda: self._count(dialect, body))
            await send_json(send, {"input_tokens": count})
        except GoneError:
            return
        except ApiError as error:
            await send_json(send, error.anthropic, error.status, error.headers)

    def _count(self, dialect: MessagesDialect, body: Body) -> int:
        dialect.service.names.check(body)
        prompt, *_ = dialect.read_prompt(body)
        body.ignore("metadata", "output_config", "cache_control")
        body.close()
        return len(prompt.tokens)


async def _page(request: HttpRequest) -> Response:
    name = _PAGE[request.url.path]
    content = files("mlx_ep.server").joinpath("page", name).read_bytes()
    headers = {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(content, headers=headers, media_type=_TYPES[name.split(".")[-1]])


def _service(request: HttpRequest) -> Service:
    return request.app.state.service


async def _health(request: HttpRequest) -> Response:
    state = _service(request).engine.state()
    reason = state.failed or ("the server drains" if state.draining else "")
    if reason:
        return JSONResponse({"status": "unavailable", "reason": reason}, 503)
    return JSONResponse({"status": "ok"})


async def _metrics(request: HttpRequest) -> Response:
    text = _service(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _state(request: HttpRequest) -> Response:
    service = _service(request)
    model = {"model": service.names.names[0], "context": service.engine.context}
    return JSONResponse(model | asdict(service.engine.state()))


def _model_object(request: HttpRequest, name: str) -> dict[str, Any]:
    started = request.app.state.started
    context = _service(request).engine.context
    return {
        "id": name,
        "object": "model",
        "created": started,
        "owned_by": "mlx_ep",
        "context_length": context,
    }


async def _models(request: HttpRequest) -> Response:
    names = _service(request).names.names
    data = [_model_object(request, name) for name in names]
    return JSONResponse({"object": "list", "data": data})


async def _model(request: HttpRequest) -> Response:
    name = request.path_params["name"]
    _service(request).names.check(Body({"model": name}))
    return JSONResponse(_model_object(request, name))


async def _experts(request: HttpRequest) -> Response:
    action = request.path_params["action"]
    if action not in _ACTIONS:
        raise ApiError(404, f"expert_distribution has {', '.join(_ACTIONS)}")
    service = _service(request)
    found = await service.read(lambda: service.engine.record(action))
    return JSONResponse(found)


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.openai, error.status, error.headers)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the routes, in OpenAI's schema."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    said = ApiError(error.status_code, f"{error.detail}: {what}")
    return JSONResponse(said.openai, error.status_code, error.headers)


async def _our_error(request: HttpRequest, error: Exception) -> Response:
    """A defect of this server: the client is told no more than that."""
    said = ApiError(500, "the server could not handle the request; its log says why")
    return JSONResponse(said.openai, 500)


class _Guard:
    """Who may ask: the API key, and web pages of no other origin.

    A page of any site can make a browser post to this machine; it says its origin.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._keys = [_digest(key.encode()) for key in access.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            return await self._app(scope, receive, send)
        headers = {"www-authenticate": "Bearer"} if problem.status == 401 else {}
        is_messages = scope["path"].startswith("/v1/messages")
        content = problem.anthropic if is_messages else problem.openai
        await send_json(send, content, problem.status, headers)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = headers.get(b"host", b"").decode("latin-1")
        if origin and not self._may_ask(origin, host):
            return ApiError(
                403, f"a web page of {origin} may not ask (--allowed-origins)"
            )
        if self._keys and scope["path"] not in _OPEN and not self._has_key(headers):
            return ApiError(
                401,
                "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
            )
        return None

    def _may_ask(self, origin: str, host: str) -> bool:
        """A listed origin, or the server's own page at a name that cannot be faked."""
        if {"*", origin} & set(self._access.origins):
            return True
        parts = urlsplit(origin)
        return parts.netloc == host and _is_fixed(parts.hostname or "")

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        digest = _digest(given or headers.get(b"x-api-key", b""))
        # All are compared, each in constant time: nothing is told by how long it took.
        return sum(hmac.compare_digest(digest, key) for key in self._keys) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_fixed(host: str) -> bool:
    """localhost or an address: a name's owner could point it here."""
    if host == "localhost":
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
