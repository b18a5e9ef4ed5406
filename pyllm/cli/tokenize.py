"""`pyllm train-tokenizer` and `pyllm tokenize`: a tokenizer of one's own, and token files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import given_text
from pyllm.cli.output import be_quiet, note, progress_bar


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("train-tokenizer")(train_tokenizer)
    app.command("tokenize")(tokenize)


def train_tokenizer(
    files: Annotated[list[Path], typer.Argument(help="Texts: .txt or .jsonl.", show_default=False)],
    out: Annotated[Path, o.option("--out", "-o", help="The new folder; it must not exist.")],
    vocab_size: Annotated[int, o.option("--vocab-size", help="Most entries; default 4096.")] = 4096,
    special: Annotated[
        list[str] | None, o.option("--special", help="A further special token; may be given several times.")
    ] = None,
    sentinels: Annotated[
        int, o.option("--sentinels", help="T5's tokens for spans, as --objective spans needs them; default none.")
    ] = 0,
    begin: Annotated[bool, o.option("--begin/--no-begin", help="Put <s> before each text; default yes.")] = True,
    chat_template: o.ChatTemplate = None,
    quiet: o.Quiet = False,
) -> int:
    """Train a byte-level BPE tokenizer; its folder is what --tokenizer of `pyllm train` takes."""
    be_quiet(quiet)
    from pyllm.train.tokenizer_training import train_tokenizer as run

    template = given_text(None, chat_template, "template") if chat_template is not None else None
    size = run(
        files,
        out,
        vocab_size=vocab_size,
        special=special or (),
        begin=begin,
        chat_template=template,
        sentinels=sentinels,
    )
    note(f"{out}: {size} tokens")
    return 0


def tokenize(
    file: Annotated[Path, typer.Argument(help="Text: .txt or .jsonl.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The new token file, .bin; it must not exist.", show_default=False)],
    tokenizer: Annotated[Path, o.option("--tokenizer", help="Folder with a tokenizer.")],
    layout: Annotated[str, o.option("--layout", help="llm.c (default) or nanogpt.")] = "llm.c",
    quiet: o.Quiet = False,
) -> int:
    """Write the tokens of a text as a file that llm.c or nanoGPT read, and `pyllm train` too."""
    be_quiet(quiet)
    from pyllm.convert.new_folder import refuse_existing
    from pyllm.train.token_files import LAYOUTS, write_bin
    from pyllm.train.token_store import open_tokens

    if layout not in LAYOUTS:
        raise typer.BadParameter(f"--layout: expected {' or '.join(LAYOUTS)}, got {layout}.")
    if out.suffix != ".bin":
        raise typer.BadParameter(f"{out}: expected a name that ends in .bin, by which token files are known.")
    refuse_existing(out)
    with progress_bar("tokenising") as progress:
        store = open_tokens(file, tokenizer, progress=progress)
    write_bin(out, store.tokens, layout)
    note(f"{out}: {len(store.tokens)} tokens of {len(store.ends)} documents")
    return 0
