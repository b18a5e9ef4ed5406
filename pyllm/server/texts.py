"""Routes that generate nothing: tokens of texts and texts of tokens, models, state and version."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pyllm import __version__
from pyllm.server.connection import read, reply, service_of
from pyllm.server.engine_thread import stopped
from pyllm.server.errors import refused
from pyllm.server.protocol import DetokenizeBody, TokenizeBody
from pyllm.server.service import Service


async def tokenize(request: Request) -> Response:
    """``POST /tokenize``: {"count", "max_model_len", "tokens"} of a text or a conversation."""
    service = service_of(request)
    body = await read(request, TokenizeBody)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise refused("prompt", "expected either prompt or messages")
    if body.messages is not None:
        messages = [message.for_template(index) for index, message in enumerate(body.messages)]
        tokens = (await service.chat_prompt(messages)).ids
    else:
        tokens = await service.encode(body.prompt or "", body.add_special_tokens)
    return reply({"count": len(tokens), "max_model_len": service.llm.max_model_len, "tokens": list(tokens)})


async def detokenize(request: Request) -> Response:
    """``POST /detokenize``: {"prompt"}, the text of token ids, special ones included."""
    service = service_of(request)
    body = await read(request, DetokenizeBody)
    service.check_model(body.model)
    return reply({"prompt": await service.decode(body.tokens)})


async def models(request: Request) -> Response:
    """``GET /v1/models``."""
    return reply({"object": "list", "data": [_model(service_of(request))]})


async def model(request: Request) -> Response:
    """``GET /v1/models/{model}``."""
    service = service_of(request)
    service.check_model(request.path_params["model"])
    return reply(_model(service))


async def health(request: Request) -> Response:
    """``GET /health``: 200 while requests are taken."""
    if not service_of(request).engine.ready:
        raise stopped()
    return reply({"status": "ok"})


async def metrics(request: Request) -> Response:
    """``GET /metrics``, for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def version(request: Request) -> Response:
    """``GET /version``."""
    return reply({"version": __version__})


def _model(service: Service) -> dict[str, object]:
    return {"id": service.model, "object": "model", "created": service.created, "owned_by": "pyllm"}
