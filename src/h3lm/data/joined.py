"""Prepared data of several sources as one sequence of blocks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from h3lm.data.blocks import Block, Blocks
from h3lm.errors import UserError


class JoinedBlocks:
    """The blocks of several prepared folders, numbered one folder after the other.

    Nothing of them is read before it is asked for; they share file descriptors and address space.

    Args:
        folders: Prepared folders by the names of their sources, in whose order they are numbered.
        split: Of each.
        block_length: L.

    Raises:
        UserError: as `Blocks`, and if they were not prepared with the same tokenizer.
    """

    def __init__(self, folders: Mapping[str, str | Path], split: str, block_length: int) -> None:
        self.parts = {name: Blocks(folders[name], split, block_length) for name in sorted(folders)}
        first = next(iter(self.parts))
        for name, part in self.parts.items():
            if _tokenizer(part) != _tokenizer(self.parts[first]):
                raise UserError(
                    f"the sources were prepared with different tokenizers: {first} "
                    f"({self.parts[first].stream.folder}) and {name} ({part.stream.folder})"
                )
            part.stream.maps = self.parts[first].stream.maps
        self.block_length = block_length
        self._firsts = np.cumsum([0, *map(len, self.parts.values())])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, i: int) -> Block:
        """Read block i, 0 <= i < len."""
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        number = int(np.searchsorted(self._firsts, i, side="right")) - 1
        return list(self.parts.values())[number][i - int(self._firsts[number])]

    @property
    def sizes(self) -> dict[str, int]:
        """Blocks of each source."""
        return {name: len(part) for name, part in self.parts.items()}

    @property
    def tokenizer_folder(self) -> Path:
        """Where a tokenizer lies that all were prepared with."""
        return next(iter(self.parts.values())).stream.tokenizer_folder

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that a model of so many embedding rows can read every token.

        Raises:
            UserError: naming a source that it cannot read.
        """
        for part in self.parts.values():
            part.stream.check_vocabulary(vocab_size)

    def verify(self) -> None:
        """Read every file and compare its sha256.

        Raises:
            UserError: naming the first file that is missing, truncated or altered.
        """
        for part in self.parts.values():
            part.stream.index.verify(part.stream.folder)


def _tokenizer(blocks: Blocks) -> list[tuple[str, str]]:
    # its configuration may tell where it was loaded from, which decides nothing
    files = blocks.stream.index.tokenizer_files
    return sorted((f.name, f.sha256) for f in files if "config" not in f.name)
