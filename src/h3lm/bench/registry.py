"""What is measured: shapes and peers of each benchmark."""

from dataclasses import dataclass

CORE_CHANNELS = 768
CORE_SHAPES = ((64, 2048), (16, 8192), (4, 32768), (1, 131072), (1, 1048576))


@dataclass(frozen=True)
class Shape:
    """Rows, channels and length of one measurement."""

    rows: int
    channels: int
    length: int

    @property
    def elements(self) -> int:
        """Positions of all rows and channels."""
        return self.rows * self.channels * self.length

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


def core_shapes() -> list[Shape]:
    """Shapes of `h3lm bench core`: one size, from short rows to one row of a million."""
    return [Shape(rows, CORE_CHANNELS, length) for rows, length in CORE_SHAPES]
