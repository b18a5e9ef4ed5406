"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64

from starlette.requests import Request
from starlette.responses import Response

from pyllm.errors import RequestError
from pyllm.ops import F32
from pyllm.pooling import Pool
from pyllm.sampling import SamplingParams
from pyllm.server.connection import finish, read, reply, service_of, submit
from pyllm.server.errors import ApiError, refused
from pyllm.server.protocol import EmbeddingBody


async def embeddings(request: Request) -> Response:
    """One vector for each text."""
    service = service_of(request)
    body = await read(request, EmbeddingBody)
    service.check_model(body.model)
    rule, width = service.embedding, service.llm.spec.hidden
    if rule is None:
        raise ApiError(400, "this model does not say how texts are embedded: serve it with --pooling")
    if body.dimensions not in (None, width):
        raise refused("dimensions", f"expected {width} or none: vectors are not cut")
    prompts = await service.prompts("input", body.prompts())
    for prompt in prompts:
        try:
            rule.check(len(prompt.ids))
        except RequestError as error:
            raise refused("input", str(error)) from error
    params = SamplingParams(max_tokens=0, detokenize=False)
    generation = await submit(request, prompts, params, pooling=rule.pooling)
    await finish(request, generation, generation.results())
    vectors = [rule.vector(one.pool) for one in generation.requests if isinstance(one.pool, Pool)]
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    read_tokens = sum(len(prompt.ids) for prompt in prompts)
    usage = {"prompt_tokens": read_tokens, "total_tokens": read_tokens}
    return reply({"object": "list", "model": service.model, "data": data, "usage": usage})


def _encoded(vector: F32, form: str | None) -> list[float] | str:
    """As numbers, or as base64 of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
