"""Labelled sound: folders of WAV and FLAC files by class, and Speech Commands."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h3lm.data.labelled import Example, RowKind
from h3lm.data.tables import ORDER, SPLIT_WORDS
from h3lm.errors import UserError

SUFFIXES = (".wav", ".flac")
INT16_SCALE = 1 / 32768
SC10 = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SPEECH_COMMANDS = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
_INSTALL = "pip install 'h3lm[audio]'"


class AudioSource:
    """Sound files in one folder for each class.

    Stored as 16-bit integers. The folder holds the classes, or train, valid and test that do.

    Args:
        folder: The folder.
        sample_rate: Wanted rate in Hz; that of the first file if None.
        resample: Whether files of other rates are converted.
        num_channels: Channels that every file has.
        classes: Only these, in this order; every folder if None.

    Raises:
        UserError: naming the file, for another rate, more channels, or no sound at all; or an
            empty class.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        sample_rate: int | None = None,
        resample: bool = False,
        num_channels: int = 1,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        root = Path(folder).expanduser()
        self.files = self._find(root, classes)
        if "train" not in self.files:
            raise UserError(f"{root}: no folder train beside {', '.join(self.files)}")
        self.classes = sorted(self.files["train"]) if classes is None else list(classes)
        self._check_classes(root)
        self.splits = [split for split in ORDER if split in self.files]
        first = next(iter(self.files["train"].values()))[0]
        self.resample = resample
        rate = sample_rate or _sound_info(first).samplerate
        self.kind = RowKind("int16", num_channels, scale=INT16_SCALE, sample_rate=rate)

    def _find(
        self, root: Path, classes: tuple[str, ...] | None
    ) -> dict[str, dict[str, list[Path]]]:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        inside = [path for path in sorted(root.iterdir()) if path.is_dir()]
        by_split = {SPLIT_WORDS[p.name.lower()]: p for p in inside if p.name.lower() in SPLIT_WORDS}
        return {
            split: {
                path.name: _sounds(path)
                for path in sorted(place.iterdir())
                if path.is_dir() and not path.name.startswith((".", "_"))
                and (classes is None or path.name in classes)
            }
            for split, place in (by_split or {"train": root}).items()
        }  # fmt: skip

    def _check_classes(self, root: Path) -> None:
        if not self.classes:
            raise UserError(f"{root}: no folder in it: a class of sounds is a folder of files")
        for split, found in self.files.items():
            place = root if len(self.files) == 1 else root / split
            for name in self.classes:
                if name not in found:
                    raise UserError(f"{place}: no folder for the class {name!r}")
                if not found[name]:
                    raise UserError(
                        f"{place / name}: an empty class: no {' or '.join(SUFFIXES)} file in it"
                    )
            for name in found:
                if name not in self.classes:
                    raise UserError(f"{place / name}: an unknown label, not in the training split")

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split, class by class."""
        for label, name in enumerate(self.classes):
            for path in self.files[split][name]:
                yield Example((self.read(path),), label)

    def read(self, path: Path) -> NDArray[np.int16]:
        """Read a file, (L, C), at the rate that is wanted."""
        soundfile = _soundfile(path)
        try:
            values, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path}: cannot be read as sound: {error}") from None
        wanted, channels = self.kind.sample_rate, self.kind.num_channels
        assert wanted is not None
        if values.shape[1] != channels:
            raise UserError(
                f"{path}: {values.shape[1]} channels instead of {channels}: give --channels "
                f"{values.shape[1]}, or mix them down"
            )
        if not np.isfinite(values).all():
            at = int((~np.isfinite(values)).any(1).argmax())
            raise UserError(f"{path}: sample {at + 1} is not a finite number")
        if rate != wanted:
            if not self.resample:
                raise UserError(
                    f"{path}: {rate:,} Hz instead of {wanted:,}: give --resample to convert it"
                )
            values = _resampled(values, rate, wanted)
        return np.clip(np.rint(values * 32768), -32768, 32767).astype(np.int16)


class SpeechCommands(AudioSource):
    """Speech Commands with its official split, all words or ten of them (SC10).

    Args:
        folder: The unpacked archive.
        classes: The words; all if None.
        sample_rate, resample: As for `AudioSource`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: tuple[str, ...] | None = None,
        sample_rate: int | None = 16000,
        resample: bool = False,
    ) -> None:
        super().__init__(folder, classes=classes, sample_rate=sample_rate, resample=resample)

    def _find(
        self, root: Path, classes: tuple[str, ...] | None
    ) -> dict[str, dict[str, list[Path]]]:
        held_out = {}
        for split, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
            try:
                held_out[split] = set((root / name).read_text(encoding="utf-8").split())
            except OSError:
                raise UserError(
                    f"{root / name}: missing from Speech Commands: unpack {SPEECH_COMMANDS} there"
                ) from None
        everything = super()._find(root, classes)["train"]
        files: dict[str, dict[str, list[Path]]] = {split: {} for split in ORDER}
        for word, paths in everything.items():
            for split in ORDER:
                files[split][word] = []
            for path in paths:
                name = f"{word}/{path.name}"
                split = next((s for s, names in held_out.items() if name in names), "train")
                files[split][word].append(path)
        return files


def _sounds(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _sound_info(path: Path) -> Any:
    soundfile = _soundfile(path)
    try:
        return soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: cannot be read as sound: {error}") from None


def _soundfile(path: Path) -> Any:
    try:
        import soundfile
    except (ImportError, OSError):
        raise UserError(f"{path}: reading sound needs soundfile: {_INSTALL}") from None
    return soundfile


def _resampled(values: NDArray, rate: int, wanted: int) -> NDArray:
    try:
        import soxr
    except ImportError:
        raise UserError(f"converting sample rates needs soxr: {_INSTALL}") from None
    return soxr.resample(values, rate, wanted)
