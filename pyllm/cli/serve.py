"""`pyllm serve`: the OpenAI-compatible server."""

from __future__ import annotations

import importlib
import ipaddress
import logging
import math
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllm.cli import FAILED, INTERRUPTED, OK
from pyllm.cli import options as o
from pyllm.cli.inputs import load, present
from pyllm.cli.output import be_quiet, complain, log_json, note

if TYPE_CHECKING:
    from pyllm.pooling import EmbeddingRule
    from pyllm.server.limits import Limits

_PORT = re.compile(r":[0-9]*\Z")
_NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("serve")(serve)


def _limit(*names: str, help: str, **more: Any) -> Any:
    return o.option(*names, help=help, env=names[0].removeprefix("--").replace("-", "_").upper(), **more)


def serve(
    model: o.DefaultModel = None,
    host: Annotated[str, _limit("--host", help="Address to listen at; default 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, _limit("--port", min=0, max=65535, help="Default 8000; 0: any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        _limit("--api-key", help="Clients must send it (Bearer); may be given several times. PYLLM_API_KEY hides it."),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        _limit("--allowed-hosts", help="Name that requests may call this server by; several times; *: any (403)."),
    ] = None,
    served_model_name: o.ServedName = None,
    max_num_seqs: o.MaxSequences = 32,
    max_num_batched_tokens: Annotated[
        int, _limit("--max-num-batched-tokens", min=1, help="Tokens of one step; default 512.")
    ] = 512,
    kv_cache_bytes: Annotated[
        int | None, _limit("--kv-cache-bytes", min=1, help="Memory for keys and values, those kept for reuse included.")
    ] = None,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Share no keys and values of equal prompt beginnings.")
    ] = False,
    max_body_bytes: Annotated[
        int | None, _limit("--max-body-bytes", min=1, help="Of a request; default 8 MiB (413).")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, _limit("--max-prompt-tokens", min=1, help="Of one prompt; default: the context (400).")
    ] = None,
    max_output_tokens: Annotated[
        int | None, _limit("--max-output-tokens", min=1, help="Of one completion; default: the context (400).")
    ] = None,
    max_n: Annotated[
        int | None, _limit("--max-n", min=1, max=16, help="Completions a prompt; default 16 (400).")
    ] = None,
    max_stop_strings: Annotated[
        int | None, _limit("--max-stop-strings", min=0, max=16, help="Of a request; default 16 (400).")
    ] = None,
    max_stop_chars: Annotated[
        int | None, _limit("--max-stop-chars", min=1, max=256, help="Of a stop string; default 256 (400).")
    ] = None,
    max_logprobs: Annotated[
        int | None, _limit("--max-logprobs", min=0, max=20, help="Alternatives listed a token; default 20 (400).")
    ] = None,
    max_queue: Annotated[
        int | None, _limit("--max-queue", min=0, help="Completions that wait for others; default 256 (429).")
    ] = None,
    max_requests: Annotated[
        int | None, _limit("--max-requests", min=1, help="HTTP requests at a time; default 512 (429).")
    ] = None,
    max_seconds: Annotated[
        float | None, _limit("--max-seconds", min=0.001, help="Of one request; default 600 (503).")
    ] = None,
    body_seconds: Annotated[
        float | None, _limit("--body-seconds", min=0.001, help="For a request's body to arrive; default 30 (408).")
    ] = None,
    drain_seconds: Annotated[
        float | None, _limit("--drain-seconds", min=0, help="For running requests after SIGTERM; default 30.")
    ] = None,
    pooling: o.Pooling = None,
    normalize: o.Normalize = None,
    chat_template: o.ChatTemplate = None,
    device: o.Device = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    quantization_skip: o.QuantizationSkip = None,
    kv_cache_dtype: o.CacheDtype = None,
    ctx_size: o.ContextSize = None,
    prefix: o.Prefix = False,
    speculative: o.Speculative = None,
    draft_model: o.DraftModel = None,
    num_speculative_tokens: o.DraftTokens = None,
    seed: Annotated[int | None, o.option("--seed", min=0, help="Where a request has none; default fresh.")] = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> int:
    """Serve a model to OpenAI clients over HTTP, many requests at a time.

    Ends on SIGTERM or Ctrl-C, after the requests in progress. One JSON line a request goes to stderr.
    """
    be_quiet(quiet)
    if (missing := missing_extra()) is not None:
        complain(f"pyllm serve needs the package {missing}: pip install 'pyllm[serve]'")
        return FAILED
    from pyllm.server.limits import Limits
    from pyllm.server.run import address_of
    from pyllm.server.run import serve as run
    from pyllm.server.service import Service

    keys = api_key or []
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise typer.BadParameter("--api-key: expected printable ASCII without spaces.")
    for name in allowed_hosts or ():
        if _PORT.search(name):
            raise typer.BadParameter(
                f"--allowed-hosts: expected a name without a port (IPv6 addresses in brackets), got {name!r}."
            )
    seconds = {"--max-seconds": max_seconds, "--body-seconds": body_seconds, "--drain-seconds": drain_seconds}
    for flag, value in seconds.items():
        if value is not None and not math.isfinite(value):
            raise typer.BadParameter(f"{flag}: expected a finite number of seconds, got {value}.")
    address = address_of(host)
    limits: Limits = Limits(
        **present(
            {
                "max_body_bytes": max_body_bytes,
                "max_prompt_tokens": max_prompt_tokens,
                "max_tokens": max_output_tokens,
                "max_n": max_n,
                "max_stop_strings": max_stop_strings,
                "max_stop_chars": max_stop_chars,
                "max_logprobs": max_logprobs,
                "max_queue": max_queue,
                "max_requests": max_requests,
                "max_seconds": max_seconds,
                "body_seconds": body_seconds,
                "drain_seconds": drain_seconds,
            }
        )
    )
    if not keys and not is_loopback(address):
        note(f"pyllm: warning: {host} is open to others and no --api-key is set: whoever reaches it can use the model")
    llm = load(
        model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        quantization_skip=quantization_skip,
        threads=threads,
        ctx_size=ctx_size,
        prefix=prefix,
        kv_cache_dtype=kv_cache_dtype,
        speculative=speculative,
        draft_model=draft_model,
        num_speculative_tokens=num_speculative_tokens,
        revision=revision,
        offline=offline,
        chat_template=chat_template,
        verbose=verbose,
        sequences=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=not no_prefix_caching,
        **present({"kv_cache_bytes": kv_cache_bytes, "seed": seed}),
    )
    name = served_model_name or served_name(model)
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # clients that go away are in the log already
    ended_by = run(
        Service(
            llm,
            name,
            limits,
            keys,
            log_json,
            embedding_of(llm.folder, pooling, normalize),
            _hosts(allowed_hosts or (), host, address, bool(keys)),
        ),
        address,
        port,
        lambda at, number: note(f"serving {name} at http://{f'[{at}]' if ':' in at else at}:{number}"),
    )
    return INTERRUPTED if ended_by == signal.SIGINT else OK


# How long the event loop may keep the interpreter from a step that wants to go on; Python's own 5 ms are as much as a
# whole step of a small model.
SWITCH_SECONDS = 0.0005


def embedding_of(folder: Path, pooling: str | None, normalize: bool | None) -> EmbeddingRule | None:
    """How texts are embedded; None where neither the options nor the folder say."""
    from pyllm.pooling import embedding_rule, says_how

    return embedding_rule(folder, pooling, normalize) if pooling is not None or says_how(folder) else None


def _hosts(given: Sequence[str], host: str, address: str, keys: bool) -> tuple[str, ...]:
    """Names by which requests may call a server at `host`, which is that `address`; none where any will do.

    Without keys, one that only this machine reaches must be called so: pages of others could reach it through a browser
    here by a name of their own.
    """
    if "*" in given or (not given and (keys or not is_loopback(address))):
        return ()
    return ("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, *given)


def missing_extra() -> str | None:
    """The first package of the extra that is not installed."""
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            return name.replace("_", "-")
    return None


def served_name(model: str | None) -> str:
    """How clients call the model: a hub name as it is, the last part of a folder's path."""
    if model is None:
        return "pyllm-stories"
    return Path(model).resolve().name if Path(model).exists() else model


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches that IP address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
