"""The page's own server: static files, the state of both servers, and answers as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sglang_orthrus.cli.play import upstream
from sglang_orthrus.cli.play.request import Question
from sglang_orthrus.cli.play.sides import Side

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 256 * 1024
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SIDES = web.AppKey("sides", Mapping[str, Side])
HTTP = web.AppKey("http", aiohttp.ClientSession)

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


def application(sides: Mapping[str, Side], is_local: bool = True) -> web.Application:
    """The page's application.

    Args:
        is_local: whether only this machine may ask. Pages of other sites, which a browser would let in under a name
            of theirs for this machine, are refused then.
    """
    app = web.Application(client_max_size=MOST_BYTES, middlewares=[_only_this_page(is_local)])
    app[SIDES] = sides
    app.cleanup_ctx.append(_client)
    app.on_response_prepare.append(_add_headers)
    app.add_routes([web.get("/api/state", state), web.post("/api/answer/{side}", answer), web.get("/", index)])
    app.add_routes([web.get(f"/{file.name}", page_file) for file in PAGE.iterdir() if file.suffix in _TYPES])
    return app


async def index(request: web.Request) -> web.StreamResponse:
    """The page."""
    return _file("index.html")


async def page_file(request: web.Request) -> web.StreamResponse:
    """What the page loads. Only names that are routes get here."""
    return _file(request.path.removeprefix("/"))


async def state(request: web.Request) -> web.Response:
    """How far both servers are."""
    return web.json_response({name: side.state() for name, side in request.app[SIDES].items()})


async def answer(request: web.Request) -> web.StreamResponse:
    """One server's answer, an event a line. A browser that leaves cancels this, and with it the server's request."""
    side = request.app[SIDES].get(request.match_info["side"])
    if side is None:
        raise web.HTTPNotFound
    try:
        question = Question.parse(await request.json())
    except ValueError as error:
        return web.json_response({"message": str(error)}, status=400)
    if not side.is_ready or side.url is None:
        return web.json_response({"message": "this server is not ready"}, status=503)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    async with aclosing(upstream.answer(request.app[HTTP], side.url, question, side.has_metrics)) as events:
        async for event in events:
            if event.pop("lost", False):
                side.is_unreachable.set()
            await response.write(json.dumps(event).encode() + b"\n")
    await response.write_eof()
    return response


def _file(name: str) -> web.Response:
    path = PAGE / name
    return web.Response(body=path.read_bytes(), content_type=_TYPES[path.suffix], charset="utf-8")


async def _client(app: web.Application) -> AsyncIterator[None]:
    async with upstream.session() as session:
        app[HTTP] = session
        yield


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _only_this_page(is_local: bool) -> Middleware:
    """Refuse what another site's page may have sent through the user's browser."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_local and request.host.rsplit(":", 1)[0] not in LOOPBACK:
            raise web.HTTPForbidden(text="This page answers to 127.0.0.1 and localhost only.")
        origin = request.headers.get("Origin")
        if origin is not None and origin.split("://")[-1] != request.host:
            raise web.HTTPForbidden(text="This page answers to itself only.")
        # A form of another site can't send JSON without asking first.
        if request.method == "POST" and request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="Send JSON.")
        return await handler(request)

    return check
