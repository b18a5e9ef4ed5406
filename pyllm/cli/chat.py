"""`pyllm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import checked, decoded, load, sampling
from pyllm.cli.output import be_quiet, complain, note, report, write
from pyllm.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from pyllm.llm import LLM
    from pyllm.sampling import SamplingParams

HELP = "/reset begins anew, /exit or Ctrl-D leaves, /help says this; Ctrl-C stops an answer."


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("chat")(chat)


def chat(
    model: o.DefaultModel = None,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    presence_penalty: o.PresencePenalty = None,
    frequency_penalty: o.FrequencyPenalty = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    system_prompt: o.SystemPrompt = None,
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
    revision: o.Revision = None,
    offline: o.Offline = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> int:
    """Talk to a model that has a chat template.

    /reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer. Answers go to stdout, all else to stderr.
    """
    be_quiet(quiet)
    params, seed = sampling(
        seed,
        model=model,
        revision=revision,
        offline=offline,
        verbose=verbose,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop or None,
    )
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
    )
    if chat_template is None and not (llm.tokenizer is not None and llm.tokenizer.has_chat_template):
        raise TokenizerError(f"{model} has no chat template: give one with --chat-template FILE, or use pyllm generate")
    note(HELP)
    failed = Conversation(llm, params, system_prompt).run()
    report(llm, seed)
    return int(failed)


class Conversation:
    """Messages so far, and the loop that reads and answers."""

    def __init__(self, llm: LLM, params: SamplingParams, system_prompt: str | None) -> None:
        """Begin with the system prompt alone."""
        self.llm, self.params = llm, params
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        self.messages = list(self.system)
        self.interactive = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> bool:
        """Until the end of the input; True when a line from a pipe or file could not be answered."""
        failed = False
        while True:
            try:
                line = self._read()
            except EOFError:
                return failed and not self.interactive
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                note("\n" + HELP)
                continue
            if not line.strip():
                continue
            if line.startswith("/"):
                if self._command(line.strip()):
                    return failed and not self.interactive
                continue
            try:
                self._answer(line)
            except RequestError as error:
                self.messages.pop()
                complain(f"{error} (/reset begins a new conversation)")
                failed = True

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        pieces = self.llm.stream_chat(self.messages, self.params)
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece.text)
                write(piece.text)
        except KeyboardInterrupt:
            note("\n(stopped)")
        finally:
            pieces.close()  # type: ignore[attr-defined]  # ends the request
        write("\n")
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _command(self, line: str) -> bool:
        """True to leave."""
        if line in ("/exit", "/quit"):
            return True
        if line == "/reset":
            self.messages = list(self.system)
            note("(a new conversation)")
        elif line == "/help":
            note(HELP)
        else:
            note(f"unknown command {line}: {HELP}")
        return False

    def _read(self) -> str:
        if sys.stdin is None:
            raise EOFError
        if self.interactive and sys.stdout is not None and sys.stdout.isatty():
            import readline  # noqa: F401  # line editing and history for input()

            return checked(input("> "), "the input")
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decoded(line, "stdin").rstrip("\r\n")
