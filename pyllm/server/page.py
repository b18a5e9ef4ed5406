"""``GET /``: a page to talk to the model. It is one file, takes nothing from elsewhere, and holds no data."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response


async def page(request: Request) -> Response:
    """The page, allowed to run its own script and style and to ask this server, and nothing else."""
    text, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)


@cache
def _page() -> tuple[str, str]:
    text = Path(__file__).with_name("page.html").read_text("utf-8")
    hashes = {
        tag: base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
        for tag in ("style", "script")
        if (match := re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
    }
    own = [f"{tag}-src 'sha256-{value}'" for tag, value in hashes.items()]
    nothing = [f"{kind} 'none'" for kind in ("default-src", "base-uri", "form-action", "frame-ancestors")]
    return text, "; ".join([*nothing, *own, "connect-src 'self'"])
