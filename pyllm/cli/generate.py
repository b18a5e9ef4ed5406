"""`pyllm generate`: complete one prompt, streaming."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllm.cli import INTERRUPTED, OK
from pyllm.cli import options as o
from pyllm.cli.inputs import given_text, load, present, sampling, structured
from pyllm.cli.output import be_quiet, peak_memory, report, write, write_json

if TYPE_CHECKING:
    from pyllm.llm import LLM
    from pyllm.sampling import SamplingParams


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("generate")(generate)


def generate(
    model: o.DefaultModel = None,
    prompt: o.Prompt = None,
    prompt_option: Annotated[str | None, o.option("--prompt", "-p", help="The prompt, as an option.")] = None,
    file: o.PromptFile = None,
    max_tokens: o.MaxTokens = None,
    min_tokens: o.MinTokens = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    presence_penalty: o.PresencePenalty = None,
    frequency_penalty: o.FrequencyPenalty = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    ignore_eos: o.IgnoreEos = False,
    json_schema: o.JsonSchema = None,
    regex: o.Regex = None,
    choice: o.Choice = None,
    grammar: o.Grammar = None,
    num_beams: o.NumBeams = None,
    length_penalty: o.LengthPenalty = None,
    early_stopping: o.EarlyStopping = None,
    num_return_sequences: o.NumReturnSequences = None,
    no_repeat_ngram_size: o.NoRepeatNgramSize = None,
    forced_bos_token_id: o.ForcedBosTokenId = None,
    forced_eos_token_id: o.ForcedEosTokenId = None,
    source_language: o.SourceLanguage = None,
    target_language: o.TargetLanguage = None,
    system_prompt: o.SystemPrompt = None,
    chat_template: o.ChatTemplate = None,
    ignore_chat_template: o.IgnoreTemplate = False,
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
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> int:
    """Complete a prompt: text to stdout as it comes, statistics to stderr.

    A model with a chat template gets the prompt as a user's message.
    """
    be_quiet(quiet)
    if prompt is not None and prompt_option is not None:
        raise typer.BadParameter("give the prompt either as argument or with --prompt, not both.")
    params, seed = sampling(
        seed,
        model=model,
        revision=revision,
        offline=offline,
        verbose=verbose,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop or None,
        ignore_eos=ignore_eos or None,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping={"true": True, "false": False}.get(early_stopping or "", early_stopping),
        n=num_return_sequences,
        no_repeat_ngram_size=no_repeat_ngram_size,
        forced_bos_token_id=forced_bos_token_id,
        forced_eos_token_id=forced_eos_token_id,
        structured_outputs=structured(json_schema, regex, choice, grammar),
    )
    text = given_text(prompt if prompt_option is None else prompt_option, file)
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
        sequences=max(params.num_beams, params.n),
    )
    request = _request(llm, text, system_prompt, ignore_chat_template, chat_template is not None)
    languages = present({"source_language": source_language, "target_language": target_language})
    if languages:
        request = {**(request if isinstance(request, dict) else {"prompt": request}), **languages}
    if json:
        return _as_json(llm, request, params, seed)
    interrupted = (_stream if params.num_beams == params.n == 1 else _whole)(llm, request, params)
    report(llm, seed, interrupted=interrupted)
    return INTERRUPTED if interrupted else OK


def _request(llm: LLM, text: str, system_prompt: str | None, ignore_template: bool, own_template: bool) -> Any:
    """The prompt as the model expects it: through the chat template where there is one."""
    tokenizer = llm.tokenizer
    if ignore_template or tokenizer is None or not (tokenizer.has_chat_template or own_template):
        if system_prompt is not None:
            raise typer.BadParameter(
                "--system-prompt needs a chat template, which this model has not or which is ignored."
            )
        return text
    messages = [{"role": "user", "content": text}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return llm.chat_prompt(messages)


def _stream(llm: LLM, request: Any, params: SamplingParams) -> bool:
    """Write the completion as it comes; True when Ctrl-C ended it, whose text so far stays."""
    pieces = llm.stream(request, params)
    last = "\n"
    try:
        for piece in pieces:
            if piece.text:
                write(piece.text)
                last = piece.text
    except KeyboardInterrupt:
        return True
    finally:
        pieces.close()  # type: ignore[attr-defined]  # ends the request
        if not last.endswith("\n"):
            write("\n")
    return False


def _whole(llm: LLM, request: Any, params: SamplingParams) -> bool:
    """Write several completions, or the best of a beam search; True when Ctrl-C ended it, with nothing to write."""
    try:
        [result] = llm.generate(request, params)
    except KeyboardInterrupt:
        return True
    write("\n\n".join(completion.text for completion in result.outputs), end="\n")
    return False


def _as_json(llm: LLM, request: Any, params: SamplingParams, seed: int) -> int:
    [result] = llm.generate(request, params)
    outputs = [
        {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **present({"score": completion.score}),
        }
        for completion in result.outputs
    ]
    write_json(
        {
            **outputs[0],
            **({} if params.n == 1 else {"outputs": outputs}),
            "prompt_tokens": len(result.prompt_token_ids),
            "seed": seed,
            "stats": {**asdict(llm.stats), "peak_memory_bytes": peak_memory()},
        }
    )
    return 0
