"""Requests that a page on this machine answers to: those that name this machine, from pages that it served itself.

A web page elsewhere can make a browser send requests to 127.0.0.1, under its own name if that name is made to point
here (DNS rebinding). Such requests carry a foreign `Host` or `Origin`, and are refused. No other site may show the page
in a frame.
"""

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Guard:
    """ASGI middleware. `hosts` are the names that requests may come under; None for all, where others are to look."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if foreign := self.foreign(headers.get("host", ""), headers.get("origin")):
            return await PlainTextResponse(foreign, status_code=403)(scope, receive, send)

        async def unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["X-Frame-Options"] = "SAMEORIGIN"
                answer.append("Content-Security-Policy", "frame-ancestors 'self'")
            await send(message)

        return await self.app(scope, receive, unframed)

    def foreign(self, host: str, origin: str | None) -> str | None:
        """Return why a request is refused; None if it is not."""
        if self.hosts is None:
            return None
        if name_of_host(f"//{host}") not in self.hosts:
            return "This page answers to names of its own machine; --allowed_hosts names others."
        if origin is not None and name_of_host(origin) not in self.hosts:
            return "This page takes requests of its own pages only."
        return None


def guarded(hosts: Collection[str] | None) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """The lifespan of a server behind a guard. Middleware that is handed to Gradio stands behind its own, of which one
    answers preflights, whatever name they come under; when the server starts, all of it is built."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.middleware_stack = Guard(app.middleware_stack, hosts)
        yield

    return lifespan


def name_of_host(address: str) -> str | None:
    """
    >>> name_of_host("http://LOCALHOST:7860"), name_of_host("//[::1]:7860"), name_of_host("null")
    ('localhost', '::1', None)
    """
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
