"""`h3lm prepare`: a text collection in, blocks of tokens out."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="A file (text, JSON lines, Parquet, each also .xz .gz .zst), a folder of them, or "
            "a Hugging Face dataset: a folder or a name."
        ),
    ],
    out_dir: Annotated[Path, typer.Argument(help="Where to write.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="characters, bytes, bpe (trained on the text), a tokenizer's folder, a folder "
            "with GPT-2's two files, or a name on the Hugging Face hub."
        ),
    ] = "bytes",
    vocab_size: Annotated[int | None, typer.Option(help="Number of ids of a bpe.")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a Hugging Face dataset.")
    ] = None,
    block_length: Annotated[
        int, typer.Option(help="Tokens of a training block, recorded as the default.")
    ] = 1024,
    valid_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share held out where the source has no validation split. By default 0.0005 of "
            "the documents, but at least 50 or a tenth; of a single text its last tenth."
        ),
    ] = None,
    shard_tokens: Annotated[
        int, typer.Option(help="Tokens of a shard: the work that an interruption may cost.")
    ] = 2**22,
    workers: Annotated[
        int | None, typer.Option(help="Encoding threads; by default one a processor.")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress line.")] = True,
) -> None:
    """Tokenize a text collection into blocks for training.

    Interrupted, it goes on where it was when it is called again in the same way.
    """
    from h3lm.data.prepare import prepare

    index = prepare(
        source,
        out_dir,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        text_field=text_field,
        subset=subset,
        block_length=block_length,
        valid_fraction=valid_fraction,
        shard_tokens=shard_tokens,
        workers=workers,
        progress=progress,
    )
    for split in index.splits:
        print(
            f"{split}: {index.num_tokens(split):,} tokens, {index.num_documents(split):,} "
            f"documents, {(index.num_tokens(split) - 1) // index.block_length:,} blocks of "
            f"{index.block_length:,}"
        )
    print(f"tokenizer: {index.vocab_size:,} ids, {out_dir / 'tokenizer'}")
    print(f"prepared: {out_dir}")
