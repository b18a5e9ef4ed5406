"""The application: the list of routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pyllm.server.chat import chat
from pyllm.server.completions import completions
from pyllm.server.connection import error_reply
from pyllm.server.embeddings import embeddings
from pyllm.server.errors import ApiError
from pyllm.server.middleware import Crowd, Front, Hosts, Keys
from pyllm.server.page import page
from pyllm.server.service import Service
from pyllm.server.texts import detokenize, health, metrics, model, models, tokenize, version

ROUTES = [
    Route("/", page, methods=["GET"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{model:path}", model, methods=["GET"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/version", version, methods=["GET"]),
]


def make_app(service: Service) -> Starlette:
    """The application that serves `service`, whose engine thread lives as long as it runs."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.stop()

    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(layer, service=service) for layer in (Front, Hosts, Keys, Crowd)],
        exception_handlers={HTTPException: _no_route, ApiError: _error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would repeat the client's Host header
    app.state.service = service
    return app


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_reply(error)


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    messages = {404: f"no route {request.url.path[:200]}", 405: f"{request.method} is not for {request.url.path[:200]}"}
    response = error_reply(ApiError(error.status_code, messages.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response
