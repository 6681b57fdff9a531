"""`h3lm prepare`: texts in, blocks of tokens out; or labelled files in, labelled rows out."""

from pathlib import Path
from typing import Annotated

import typer

from h3lm.cli.options import refuse

FOR_TEXTS = ("vocab_size", "subset", "block_length", "shard_tokens", "workers")
FOR_LABELS = (
    "length", "pad", "test_fraction", "label_field", "values_field", "split_field", "test_value",
    "sample_rate", "resample", "channels", "speaker", "examples",
)  # fmt: skip


def prepare(
    call: typer.Context,
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
        int | None, typer.Option(help="Encoding threads; by default one a processor, up to 32.")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress line.")] = True,
    labelled: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="Labelled sequences for classification, not text for a language model. One of "
            "table, audio, text, speech-commands, sc10, fsdd, mnist, listops, lra-listops, "
            "lra-text, lra-retrieval, lra-image, lra-pathfinder, lra-pathx.",
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Labelled: cut longer rows there.")
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Labelled: rows may have unequal lengths.")
    ] = False,
    test_fraction: Annotated[
        float | None, typer.Option(help="Labelled: share of the examples held out as a test.")
    ] = None,
    label_field: Annotated[str, typer.Option(help="Labelled: field of the class.")] = "label",
    values_field: Annotated[str, typer.Option(help="Labelled: column of the series.")] = "values",
    split_field: Annotated[str | None, typer.Option(help="Labelled: field of the split.")] = None,
    test_value: Annotated[
        str | None, typer.Option(help="Labelled: value of that field that is the test split.")
    ] = None,
    sample_rate: Annotated[
        int | None, typer.Option(min=1, help="Sound: wanted rate in Hz.")
    ] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Sound: convert other rates.")
    ] = False,
    channels: Annotated[int, typer.Option(help="Sound: channels of every file.")] = 1,
    speaker: Annotated[str | None, typer.Option(help="fsdd: whose clips are the test.")] = None,
    examples: Annotated[int | None, typer.Option(help="listops: training examples.")] = None,
) -> None:
    """Tokenize a text collection into blocks for training, or prepare labelled sequences.

    A text collection, interrupted, goes on where it was when it is called again in the same way.
    """
    if labelled is not None:
        refuse(call, FOR_TEXTS, "texts of language models, not for --labelled")
        from h3lm.data.prepare_labelled import LabelledOptions, describe, prepare_labelled

        options = LabelledOptions(
            length=length, pad=pad, valid_fraction=valid_fraction, test_fraction=test_fraction,
            tokenizer=tokenizer, text_field=text_field, label_field=label_field,
            values_field=values_field, split_field=split_field, test_value=test_value,
            sample_rate=sample_rate, resample=resample, channels=channels, speaker=speaker,
            examples=examples,
        )  # fmt: skip
        made = prepare_labelled(source, out_dir, labelled, options, progress=progress)
        print("\n".join(describe(made)))
        print(f"prepared: {out_dir}")
        return
    refuse(call, FOR_LABELS, "--labelled")
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
