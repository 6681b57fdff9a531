"""Small labelled sets in their own forms: spoken digits, digit images, labelled texts."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from h3lm.data.labelled import Example, RowKind, class_index
from h3lm.data.signals import INT16_SCALE
from h3lm.data.sources import open_unpacked
from h3lm.data.tables import ORDER, SPLIT_WORDS
from h3lm.data.tokenizers import Encoder
from h3lm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DIGITS = tuple(map(str, range(10)))


class SpokenDigits:
    """The Free Spoken Digit Dataset as one vector of samples and a table of clips.

    Args:
        folder: Holds `audio_int16.npy.xz` and `clips.csv`.
        speaker: Whose clips are the test split, all others being for training; None for the
            official split.

    Raises:
        UserError: if a file is missing or damaged, or there is no such speaker.
    """

    kind = RowKind("int16", 1, scale=INT16_SCALE, sample_rate=8000)
    classes = DIGITS
    splits = ("train", "test")

    def __init__(self, folder: str | Path, *, speaker: str | None = None) -> None:
        place = Path(folder).expanduser()
        self.samples = _load_array(place / "audio_int16.npy.xz")
        try:
            with (place / "clips.csv").open(encoding="utf-8", newline="") as lines:
                self.clips = list(csv.DictReader(lines))
        except OSError as error:
            raise UserError(f"{place / 'clips.csv'}: cannot be read: {error.strerror}") from None
        self.speaker = speaker
        speakers = sorted({clip["speaker"] for clip in self.clips})
        if speaker is not None and speaker not in speakers:
            raise UserError(f"no speaker {speaker!r}, only {', '.join(speakers)}")

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        for clip in self.clips:
            place = clip["split"]
            if self.speaker is not None:
                place = "test" if clip["speaker"] == self.speaker else "train"
            if place == split:
                start = int(clip["start"])
                row = self.samples[start : start + int(clip["length"])]
                yield Example((row[:, None],), int(clip["digit"]))


class DigitImages:
    """MNIST images, pixels in raster order: `{train,test}_images_u8.npy.xz` and labels."""

    kind = RowKind("uint8", 1, scale=1 / 127.5, shift=-1.0)
    classes = DIGITS
    splits = ("train", "test")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        images = _load_array(self.folder / f"{split}_images_u8.npy.xz")
        labels = _load_array(self.folder / f"{split}_labels_u8.npy")
        for image, label in zip(images, labels, strict=True):
            yield Example((image.reshape(-1, 1),), int(label))


class LabelledText:
    """JSON lines with a text and a label each, as ids of a tokenizer, end of text included.

    Args:
        path: A file (also .xz, .gz, .zst), or a folder of files whose names say their split.
        tokenizer: Text to ids.
        text_field, label_field: Names of the two fields.
        split_field: Field that tells the split, if there is one.
        test_value: Lines whose `split_field` has this value are the test split, all others are
            for training; None if the field holds names of splits.

    Raises:
        UserError: naming the file and the line, for whatever is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        text_field: str = "text",
        label_field: str = "label",
        split_field: str | None = None,
        test_value: str | None = None,
    ) -> None:
        self.files = _jsonl_files(Path(path).expanduser())
        self.fields = text_field, label_field, split_field
        self.test_value = test_value
        self.encode = Encoder(tokenizer)
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = max(tokenizer.get_vocab().values()) + 1
        self.kind = RowKind("uint16" if ids <= 2**16 else "uint32", vocab_size=ids)
        found: dict[str, set[str]] = {}
        for split, _, label, _ in self._lines():
            found.setdefault(split, set()).add(label)
        self.splits = [split for split in ORDER if split in found]
        if "train" not in found:
            raise UserError(f"{path}: no labelled text for training in it")
        names = found["train"]
        numbers = all(name.isdigit() for name in names)
        self.classes = sorted(names, key=int) if numbers else sorted(names)

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        for of, text, label, where in self._lines():
            if of == split:
                ids = np.append(self.encode(text), self.end).astype(self.kind.dtype)
                yield Example((ids,), class_index(self.classes, label, where))

    def _lines(self) -> Iterator[tuple[str, str, str, str]]:
        """Split, text, label and place of every line."""
        text_field, label_field, split_field = self.fields
        for file_split, path in self.files:
            with open_unpacked(path) as stream:
                for number, line in enumerate(stream, 1):
                    if line.isspace():
                        continue
                    where = f"{path}, line {number:,}"
                    row = _row(line, where)
                    for name in (text_field, label_field, split_field):
                        if name is not None and name not in row:
                            raise UserError(
                                f"{where}: no field {name!r}, only "
                                f"{', '.join(map(repr, row))}: name it with --text-field, "
                                "--label-field or --split-field"
                            )
                    split = file_split
                    if split_field is not None:
                        split = self._split(str(row[split_field]), where)
                    yield split, str(row[text_field]), str(row[label_field]), where

    def _split(self, value: str, where: str) -> str:
        if self.test_value is not None:
            return "test" if value == self.test_value else "train"
        if value not in SPLIT_WORDS:
            raise UserError(
                f"{where}: split {value!r} is not train, valid or test: say with --test-value "
                "which value is the test split"
            )
        return SPLIT_WORDS[value]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: JSON lines hold one object a line, not a {type(row).__name__}")
    return row


def _jsonl_files(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        return [("train", path)]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    found = []
    for file in sorted(path.iterdir()):
        words = file.name.lower().replace("-", ".").replace("_", ".").split(".")
        if file.is_file() and ("jsonl" in words or "json" in words):
            split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
            found.append((split, file))
    if not found:
        raise UserError(f"{path}: no JSON lines in this folder")
    return found


def _load_array(path: Path) -> NDArray:
    """Read an .npy file, also as .xz."""
    with open_unpacked(path) as stream:
        try:
            return np.lib.format.read_array(io.BytesIO(stream.read()), allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path}: no array, or damaged ({error})") from None
