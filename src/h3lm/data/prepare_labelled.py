"""From labelled files to a prepared folder: which form is read how."""

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

from h3lm.data import lra
from h3lm.data.labelled import HeldOut, LabelledIndex, Shaped, Source, write_labelled
from h3lm.data.signals import SC10, AudioSource, SpeechCommands
from h3lm.data.small_sets import DigitImages, LabelledText, SpokenDigits
from h3lm.data.tables import TableSource
from h3lm.data.tokenizers import load_tokenizer
from h3lm.errors import UserError

FORMS = {
    "table": "series from .npz, .parquet or .ts files",
    "audio": "WAV or FLAC files in a folder for each class",
    "text": "JSON lines with a text and a label",
    "speech-commands": "Speech Commands, all words, official split",
    "sc10": "Speech Commands, ten words",
    "fsdd": "Free Spoken Digit Dataset",
    "mnist": "MNIST, pixel by pixel",
    "listops": "ListOps, generated: SOURCE is the seed",
    "lra-listops": "ListOps of the Long Range Arena's release",
    "lra-text": "IMDb reviews, byte by byte (aclImdb)",
    "lra-retrieval": "pairs of papers, byte by byte (AAN)",
    "lra-image": "CIFAR-10 in grey, pixel by pixel",
    "lra-pathfinder": "Pathfinder, 32 x 32 pixels",
    "lra-pathx": "Path-X: Pathfinder, 128 x 128 pixels",
}
# Forms whose rows are of unequal lengths by nature
UNEQUAL = {"text", "listops", "lra-listops", "lra-text", "lra-retrieval"}
LRA_LENGTHS = {"lra-text": 4096, "lra-retrieval": 4000, "lra-listops": 2048}


@dataclass(frozen=True)
class LabelledOptions:
    """How labelled files are read; what a form does not need must be left alone.

    Attributes:
        length: Longer rows are cut there.
        pad: Whether rows may have unequal lengths; batches are then padded and masked.
        valid_fraction, test_fraction: Parts of the training examples to hold out.
        tokenizer: Of texts, as for `h3lm prepare`.
        text_field, label_field, values_field, split_field: Names of fields or columns.
        test_value: Value of `split_field` that is the test split.
        sample_rate: Of sound, in Hz; that of the first file if None.
        resample: Whether sound of other rates is converted.
        channels: Of sound.
        speaker: Whose clips of `fsdd` are the test split.
        examples: Training examples of generated `listops`; as many as the release if None.
        min_length, max_length: Of generated `listops`.
    """

    length: int | None = None
    pad: bool = False
    valid_fraction: float | None = None
    test_fraction: float | None = None
    tokenizer: str = "bytes"
    text_field: str = "text"
    label_field: str = "label"
    values_field: str = "values"
    split_field: str | None = None
    test_value: str | None = None
    sample_rate: int | None = None
    resample: bool = False
    channels: int = 1
    speaker: str | None = None
    examples: int | None = None
    min_length: int = 500
    max_length: int = 2000


def prepare_labelled(
    source: str | Path,
    out_dir: str | Path,
    form: str,
    options: LabelledOptions | None = None,
    *,
    progress: bool = False,
) -> LabelledIndex:
    """Write a labelled set into a folder that `Labelled` reads.

    Args:
        source: A file, a folder, the beginning of the names of several tables; the seed of
            generated ListOps.
        out_dir: A new or empty folder.
        form: A name of `FORMS`.
        options: How to read it.
        progress: Whether to show a progress line on standard error.

    Returns:
        The index, as written to `labelled.json`.

    Raises:
        UserError: for whatever is wrong with the source, the options or the folder.
    """
    options = options or LabelledOptions()
    if form not in FORMS:
        near = get_close_matches(form, FORMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"there is no form {form!r}, only {', '.join(FORMS)}{hint}")
    tokenizer = load_tokenizer(options.tokenizer) if form == "text" else None
    if form == "text":
        assert tokenizer is not None
        found: Source = LabelledText(
            source, tokenizer,
            text_field=options.text_field, label_field=options.label_field,
            split_field=options.split_field, test_value=options.test_value,
        )  # fmt: skip
    else:
        found = _open(source, form, options)
    for split, fraction in (("test", options.test_fraction), ("valid", options.valid_fraction)):
        if fraction is not None:
            found = HeldOut(found, split, fraction, seed=2357 + (split == "test"))
    length = LRA_LENGTHS.get(form) if options.length is None else options.length
    found = Shaped(found, length=length, pad=options.pad or form in UNEQUAL)
    settings = {"form": form, "source": str(source)} | asdict(options)
    return write_labelled(found, out_dir, settings, tokenizer=tokenizer, progress=progress)


def _open(source: str | Path, form: str, options: LabelledOptions) -> Source:
    if form == "listops":
        return _generated(source, options)
    if form in lra.TASKS:
        return lra.TASKS[form](str(source))
    if form == "table":
        return TableSource(
            source, values_field=options.values_field, label_field=options.label_field,
            split_field=options.split_field,
        )  # fmt: skip
    if form == "audio":
        return AudioSource(
            source, sample_rate=options.sample_rate, resample=options.resample,
            num_channels=options.channels,
        )  # fmt: skip
    if form in ("sc10", "speech-commands"):
        return SpeechCommands(
            source, classes=SC10 if form == "sc10" else None,
            sample_rate=options.sample_rate or 16000, resample=options.resample,
        )  # fmt: skip
    if form == "fsdd":
        return SpokenDigits(source, speaker=options.speaker)
    return DigitImages(source)


def _generated(source: str | Path, options: LabelledOptions) -> Source:
    if not str(source).isdigit():
        raise UserError(f"listops is generated: SOURCE is a seed, a number, not {str(source)!r}")
    train = lra.TRAIN_SIZE if options.examples is None else options.examples
    return lra.GeneratedListOps(
        train, min(lra.HELD_OUT_SIZE, max(1, train // 10)), seed=int(str(source)),
        min_length=options.min_length, max_length=options.max_length,
    )  # fmt: skip


def describe(index: LabelledIndex) -> list[str]:
    """What was prepared, in lines."""
    kind = index.kind
    what = (
        f"{kind.vocab_size} ids" if kind.num_channels is None else f"{kind.num_channels} channels"
    )
    rate = f", {kind.sample_rate:,} Hz" if kind.sample_rate else ""
    lines = [f"{len(index.classes)} classes, {what}{rate}"]
    for name, split in index.splits.items():
        span = f"{split.shortest:,} to {split.longest:,}"
        length = f"{split.longest:,}" if split.shortest == split.longest else span
        lines.append(f"{name}: {split.num_examples:,} examples of length {length}")
    return lines
