"""Arrays of a run's figures in files, so that a killed run goes on where it was."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from h3lm.errors import UserError


class KeptArrays:
    """Arrays that start as NaN and keep what is written to them beyond the end of the process.

    Args:
        folder: Where their files are; None for arrays in memory only.
        prefix: How the names of their files begin.
    """

    def __init__(self, folder: Path | None = None, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix

    def __call__(
        self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> NDArray[Any]:
        """The array of a name: what is there of it, or NaN.

        Raises:
            UserError: if its file is damaged or of another shape, or cannot be written.
        """
        if self.folder is None:
            return np.full(shape, np.nan, dtype)
        path = self.folder / f"{self.prefix}{name}.npy"
        try:
            if not path.exists():
                # under another name until it is whole: a file cut short is not taken for it
                whole = path.with_suffix(".new")
                with whole.open("wb") as file:
                    np.save(file, np.full(shape, np.nan, dtype))
                whole.replace(path)
            np.load(path, mmap_mode="r")  # refuses a file cut short, which "r+" makes longer
            found = np.load(path, mmap_mode="r+")
        except OSError as error:
            raise UserError(f"{path}: cannot be used ({error.strerror or error})") from None
        except (ValueError, EOFError):
            raise UserError(f"{path}: is damaged; remove it, and it is made anew") from None
        if found.shape != shape or found.dtype != dtype:
            raise UserError(f"{path}: is of another text; remove it, and it is made anew")
        return found


def is_known(values: NDArray[Any]) -> bool:
    """Whether all of them were written."""
    return not bool(np.isnan(values).any())
