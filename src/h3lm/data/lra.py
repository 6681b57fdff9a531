"""The tasks of the Long Range Arena, from the files that were released.

Source: Tay et al. 2021 (Long Range Arena), with the lengths and inputs of Gu et al. 2022 (S4):
symbols of ListOps without round brackets, bytes of text, grey pixels in raster order.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from h3lm.data import listops
from h3lm.data.labelled import Example, RowKind, Source, class_index
from h3lm.errors import UserError

RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BYTES = 256  # the id behind them ends a text
LISTOPS_END = len(listops.SYMBOLS)
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
TRAIN_SIZE = 96_000  # of ListOps, as released
HELD_OUT_SIZE = 2_000


class _Task:
    """A task whose splits are functions of files."""

    kind: RowKind
    classes: Sequence[str]
    splits: Sequence[str] = ("train", "valid", "test")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def _file(self, name: str, source: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{path}: missing from the released set: get it from {source}")
        return path


class ListOps(_Task):
    """`basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv` of listops-1000."""

    kind = RowKind("uint8", vocab_size=LISTOPS_END + 1)
    classes = tuple(map(str, range(10)))

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split; every expression is evaluated and compared with its label."""
        name = {"train": "basic_train", "valid": "basic_val", "test": "basic_test"}[split]
        path = self._file(f"{name}.tsv", RELEASE)
        with path.open(encoding="utf-8") as lines:
            next(lines, None)  # Source, Target
            for number, line in enumerate(lines, 2):
                text, tab, label = line.rstrip("\n").rpartition("\t")
                where = f"{path}, line {number:,}"
                if not tab:
                    raise UserError(f"{where}: no tab between expression and label")
                try:
                    tokens = listops.parse(text)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                index = class_index(self.classes, label, where)
                if listops.evaluate(tokens) != index:
                    raise UserError(
                        f"{where}: the expression is {listops.evaluate(tokens)}, its label {label}"
                    )
                yield Example((_listops_row(tokens),), index)


class GeneratedListOps:
    """ListOps made here: train, valid and test one after the other from one stream of trees.

    Args:
        num_train: Training examples; 96,000 in the release.
        num_held_out: Examples of validation and of test each.
        seed: Of the stream.
        min_length, max_length: Trees are longer and shorter; 500 and 2,000 in the release.
    """

    kind = ListOps.kind
    classes = ListOps.classes
    splits = ("train", "valid", "test")

    def __init__(
        self,
        num_train: int = TRAIN_SIZE,
        num_held_out: int = HELD_OUT_SIZE,
        *,
        seed: int = 0,
        min_length: int = 500,
        max_length: int = 2000,
    ) -> None:
        sizes = dict(zip(self.splits, (num_train, num_held_out, num_held_out), strict=True))
        if min(sizes.values()) < 1:
            raise UserError("generated ListOps needs at least one example of each split")
        self.sizes = sizes
        self.trees = listops.generate(seed, min_length=min_length, max_length=max_length)
        self.next = 0

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split; the splits are taken once, in order."""
        if split != self.splits[self.next]:
            raise ValueError(f"{split} comes out of order: the trees are one stream")
        self.next += 1
        for tree in islice(self.trees, self.sizes[split]):
            yield Example((_listops_row(tree.tokens),), tree.value)


class Text(_Task):
    """Bytes of IMDb reviews: the folders of aclImdb. Its test split is the released one."""

    kind = RowKind("uint16", vocab_size=BYTES + 1)
    classes = ("neg", "pos")
    splits = ("train", "test")

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split, class by class."""
        for label, name in enumerate(self.classes):
            folder = self._file(f"{split}/{name}", IMDB)
            for path in sorted(folder.glob("*.txt")):
                yield Example((_text_row(path.read_bytes()),), label)


class Retrieval(_Task):
    """Pairs of papers of the ACL Anthology Network: `new_aan_pairs.{train,eval,test}.tsv`."""

    kind = RowKind("uint16", vocab_size=BYTES + 1, rows_per_example=2)
    classes = ("unrelated", "related")

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        name = {"train": "train", "valid": "eval", "test": "test"}[split]
        path = self._file(f"new_aan_pairs.{name}.tsv", RELEASE)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                parts = line.rstrip(b"\n").split(b"\t")
                if len(parts) != 5:
                    raise UserError(
                        f"{path}, line {number:,}: {len(parts)} fields instead of 5 (label, two "
                        "names, two texts)"
                    )
                label = class_index(
                    ("0", "1"), parts[0].decode().removesuffix(".0"), f"{path}, line {number:,}"
                )
                yield Example((_text_row(parts[3]), _text_row(parts[4])), label)


class Image(_Task):
    """CIFAR-10 in grey, pixels in raster order: the binary version's `data_batch_1.bin`, ..."""

    # centred and scaled by the grey training pixels, as in S4
    kind = RowKind("uint8", 1, scale=1 / 61.0, shift=-122.6 / 61.0)
    classes = CIFAR_CLASSES
    splits = ("train", "test")

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        for name in names:
            path = self._file(f"{name}.bin", CIFAR)
            data = np.fromfile(path, np.uint8)
            if len(data) % 3073:
                raise UserError(f"{path}: {len(data):,} bytes are no whole number of images")
            for record in data.reshape(-1, 3073):
                yield Example((_grey(record[1:].reshape(3, 1024))[:, None],), int(record[0]))


class Pathfinder(_Task):
    """Images of dashed paths, `pathfinder32` or `pathfinder128`, contour length 14.

    80, 10 and 10 % in a fixed random order. The release's one empty image is passed over.

    Args:
        folder: `pathfinder32` (length 1,024) or `pathfinder128` (Path-X, length 16,384).
    """

    kind = RowKind("uint8", 1, scale=1 / 127.5, shift=-1.0)
    classes = ("unconnected", "connected")
    subset = "curv_contour_length_14"

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        from PIL import Image as Picture  # comes with matplotlib

        images = self._images()
        order = np.random.default_rng(42).permutation(len(images))
        first, second = len(images) * 8 // 10, len(images) * 9 // 10
        part = {"train": slice(first), "valid": slice(first, second), "test": slice(second, None)}
        for i in order[part[split]]:
            path, label = images[i]
            if path.stat().st_size:
                with Picture.open(path) as picture:
                    pixels = np.asarray(picture.convert("L"), np.uint8)
                yield Example((pixels.reshape(-1, 1),), label)

    def _images(self) -> list[tuple[Path, int]]:
        folder = self._file(self.subset, RELEASE)
        metadata = self._file(f"{self.subset}/metadata", RELEASE)
        found = []
        for file in sorted(metadata.glob("*.npy"), key=lambda path: int(path.stem)):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                words = line.split()
                where = f"{file}, line {number:,}"
                if len(words) < 4:
                    raise UserError(f"{where}: {len(words)} fields instead of 4 or more")
                path = folder / words[0] / words[1]
                if not path.exists():
                    raise UserError(f"{path}: missing from the released set: get it from {RELEASE}")
                found.append((path, class_index(("0", "1"), words[3], where)))
        if not found:
            raise UserError(f"{metadata}: no list of images in it: get it from {RELEASE}")
        return found


TASKS: dict[str, Callable[[str], Source]] = {
    "lra-listops": ListOps,
    "lra-text": Text,
    "lra-retrieval": Retrieval,
    "lra-image": Image,
    "lra-pathfinder": Pathfinder,
    "lra-pathx": Pathfinder,
}


def _listops_row(tokens: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.append(tokens, np.uint8(LISTOPS_END))


def _text_row(text: bytes) -> NDArray[np.uint16]:
    return np.append(np.frombuffer(text, np.uint8).astype(np.uint16), np.uint16(BYTES))


def _grey(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma of ITU-R 601-2, rounded as imaging libraries do, (3, n) to (n,)."""
    red, green, blue = planes.astype(np.uint32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
