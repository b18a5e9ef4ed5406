"""Options that several subcommands share; most are also read from variables PYLLM_<NAME>, which a flag overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(*names: str, help: str, env: str | None = None, **more: Any) -> Any:
    """A typer option that also reads PYLLM_<ENV>."""
    return typer.Option(*names, help=help, envvar=f"PYLLM_{env}" if env else None, show_default=False, **more)


def _threads(value: int | None) -> int | None:
    if value is None:
        from pyllm.isa import default_threads

        default_threads()  # PYLLM_THREADS is checked here, before anything is loaded
    return value


Model = Annotated[
    str, option("--model", "-m", env="MODEL", help="Folder in the Hugging Face layout, or a hub name (owner/name).")
]
DefaultModel = Annotated[
    str | None,
    option(
        "--model",
        "-m",
        env="MODEL",
        help="Folder in the Hugging Face layout, or a hub name (owner/name); default: the storyteller in the package.",
    ),
]
Prompt = Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)]
PromptFile = Annotated[Path | None, option("--file", "-f", help="Read the prompt from this file.")]

# How the model is loaded
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        min=1,
        max=1024,
        help="Default: PYLLM_THREADS, else all physical cores.",
        callback=_threads,
        show_default=False,
    ),
]
Device = Annotated[
    str | None, option("--device", env="DEVICE", help="auto (default: a GPU where there is one), cpu or cuda.")
]
Dtype = Annotated[
    str | None, option("--dtype", env="DTYPE", help="Of the weights: auto (default), float32, float16 or bfloat16.")
]
Quantization = Annotated[
    str | None, option("--quantization", env="QUANTIZATION", help="Round weights to int8 or int4; default: do not.")
]
QuantizationSkip = Annotated[
    list[str] | None,
    option(
        "--quantization-skip",
        help="Shell pattern of weights that are not rounded, as '*.mlp.down.weight'; may be given several times.",
    ),
]
CacheDtype = Annotated[
    str | None, option("--kv-cache-dtype", env="KV_CACHE_DTYPE", help="auto (default), float32, bfloat16 or int8.")
]
ContextSize = Annotated[
    int | None,
    option(
        "--ctx-size", "-c", env="CTX_SIZE", min=1, help="Most tokens of prompt and completion; default the model's."
    ),
]
Prefix = Annotated[
    bool, option("--prefix", env="PREFIX", help="The tokens of a prompt see all of it, not only what is before them.")
]
Speculative = Annotated[
    str | None,
    option(
        "--speculative",
        env="SPECULATIVE",
        help="ngram: guess tokens from the text so far and check several at once; same output. Default: off.",
    ),
]
DraftModel = Annotated[
    str | None,
    option("--draft-model", env="DRAFT_MODEL", help="A smaller model with the same vocabulary guesses tokens instead."),
]
DraftTokens = Annotated[
    int | None,
    option(
        "--num-speculative-tokens",
        env="NUM_SPECULATIVE_TOKENS",
        min=1,
        help="Tokens guessed at once, at most; default 7 with ngram, 4 with a draft model.",
    ),
]
Revision = Annotated[str | None, option("--revision", env="REVISION", help="Branch, tag or commit of a hub model.")]
Offline = Annotated[bool, option("--offline", env="OFFLINE", help="Use only what is downloaded already.")]

# Sampling
MaxTokens = Annotated[
    int | None, option("--max-tokens", "-n", env="MAX_TOKENS", min=1, help="Most tokens to generate; default 128.")
]
MinTokens = Annotated[int | None, option("--min-tokens", env="MIN_TOKENS", min=0, help="Fewest tokens; default 0.")]
Temperature = Annotated[
    float | None,
    option("--temperature", "--temp", env="TEMPERATURE", help="0: always the likeliest token; default 1."),
]
TopK = Annotated[int | None, option("--top-k", env="TOP_K", help="Draw from the k likeliest tokens; 0 (default): all.")]
TopP = Annotated[
    float | None, option("--top-p", env="TOP_P", help="Draw from the likeliest that hold this share; default 1.")
]
MinP = Annotated[
    float | None, option("--min-p", env="MIN_P", help="Leave out tokens below this share of the likeliest; default 0.")
]
RepetitionPenalty = Annotated[
    float | None, option("--repetition-penalty", env="REPETITION_PENALTY", help="Above 1: repeat less; default 1.")
]
PresencePenalty = Annotated[
    float | None, option("--presence-penalty", env="PRESENCE_PENALTY", help="-2 to 2; default 0.")
]
FrequencyPenalty = Annotated[
    float | None, option("--frequency-penalty", env="FREQUENCY_PENALTY", help="-2 to 2; default 0.")
]
Seed = Annotated[
    int | None, option("--seed", "-s", env="SEED", min=0, help="Of the draws; default fresh, and printed at the end.")
]
Stop = Annotated[list[str] | None, option("--stop", help="End before this text; may be given several times.")]
IgnoreEos = Annotated[bool, option("--ignore-eos", help="Go on after the model's end token.")]
JsonSchema = Annotated[Path | None, option("--json-schema", help="The output matches the JSON schema in this file.")]
Regex = Annotated[str | None, option("--regex", help="The whole output matches this regular expression.")]
Choice = Annotated[list[str] | None, option("--choice", help="A possible output; give all of them, one each.")]
Grammar = Annotated[Path | None, option("--grammar", help="The output matches the Lark grammar in this file.")]

# Choosing
SourceLanguage = Annotated[str | None, option("--from", help="The prompt's language as mBART marks it, such as de_DE.")]
TargetLanguage = Annotated[str | None, option("--to", help="The language to write in, as mBART marks it.")]
NumBeams = Annotated[
    int | None,
    option("--num-beams", env="NUM_BEAMS", help="Beam search over so many continuations, at most 16; default 1: off."),
]
LengthPenalty = Annotated[
    float | None,
    option("--length-penalty", env="LENGTH_PENALTY", help="Of beams: above 0 favours long ones; default 1."),
]
EarlyStopping = Annotated[
    str | None,
    option(
        "--early-stopping",
        env="EARLY_STOPPING",
        help="Of beams: end with as many ended ones as beams (true), or when none that runs is better (false, default) "
        "or could become so (never).",
    ),
]
NumReturnSequences = Annotated[
    int | None,
    option(
        "--num-return-sequences",
        env="NUM_RETURN_SEQUENCES",
        min=1,
        help="So many completions, an empty line between them; of beam search the best. Default 1.",
    ),
]
ForcedBosTokenId = Annotated[
    int | None, option("--forced-bos-token-id", help="First token of the output; default: as the folder says.")
]
ForcedEosTokenId = Annotated[
    int | None,
    option("--forced-eos-token-id", help="Last token of an output of --max-tokens; default: as the folder says."),
]
NoRepeatNgramSize = Annotated[
    int | None,
    option(
        "--no-repeat-ngram-size",
        env="NO_REPEAT_NGRAM_SIZE",
        help="No sequence of so many tokens may stand twice; default 0: off.",
    ),
]

# Chat templates
SystemPrompt = Annotated[
    str | None, option("--system-prompt", env="SYSTEM_PROMPT", help="First message of the conversation.")
]
ChatTemplate = Annotated[
    Path | None, option("--chat-template", help="File with a jinja template that replaces the model's own.")
]
ServedName = Annotated[
    str | None,
    option("--served-model-name", env="SERVED_MODEL_NAME", help="Name in requests; default: that of the folder."),
]
MaxSequences = Annotated[
    int,
    option("--max-num-seqs", env="MAX_NUM_SEQS", min=1, max=1024, help="Completions that run together; default 32."),
]
Pooling = Annotated[
    str | None,
    option("--pooling", env="POOLING", help="Of embeddings: last, cls, mean or max; default what the folder says."),
]
Normalize = Annotated[
    bool | None, option("--normalize/--no-normalize", help="Embeddings of length 1; default as the folder says.")
]
IgnoreTemplate = Annotated[
    bool, option("--ignore-chat-template", help="Give the prompt to the model as it is, template or not.")
]

# Output
Verbose = Annotated[
    bool, option("--verbose", "-v", help="Say which values are used: of sampling, dtypes, context, threads, ISA level.")
]
Quiet = Annotated[bool, option("--quiet", "-q", help="No progress, statistics or warnings on stderr.")]
Json = Annotated[bool, option("--json", help="Print one JSON object on stdout instead of text.")]


def _version(asked: bool) -> None:
    if asked:
        from pyllm import __version__
        from pyllm.cli.output import write

        write(f"pyllm {__version__}", end="\n")
        raise typer.Exit


def main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Run transformer language models on the CPU."""


def refuse(context: typer.Context, names: tuple[str, ...], where: str) -> None:
    """Raise for options that stand on the command line and would be ignored."""
    named = [name for name in names if given(context, name)]
    if named:
        listed = ", ".join("--" + name.removesuffix("_files").replace("_", "-") for name in named)
        raise typer.BadParameter(f"{listed}: only {where}.")


def given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
