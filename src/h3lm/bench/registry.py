"""What is measured: shapes and peers of each benchmark."""

from dataclasses import dataclass

CORE_CHANNELS = 768
CORE_SHAPES = ((64, 2048), (16, 8192), (4, 32768), (1, 131072), (1, 1048576))
SMALL_SHAPES = ((8, 512), (1, 2048))  # that take less time than the host needs for their calls
TRAIN_LENGTHS = (2048, 8192, 32768)
TRAIN_TOKENS = {"125m": 32768, "355m": 32768, "1.3b": 16384, "2.7b": 8192}  # a step of a GPU
CONV_LENGTHS = (256, 1024, 2048, 4096, 8192, 16384, 32768, 131072, 1048576)
CONV_ELEMENTS = 64 * 768 * 2048  # of a measurement; one row of 768 channels where that is more
FIGURE_ROWS, FIGURE_CHANNELS = 8, 1024  # of the paper's Figure 2
FIGURE_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SCALING_ROWS = 4
SCALING_LENGTHS = tuple(2**n for n in range(8, 21))
SCALING_CHANNELS, SCALING_LENGTH = (256, 512, 1024, 2048, 4096), 16384


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
        width = "" if self.channels == CORE_CHANNELS else f"x{self.channels}"
        return f"{self.rows}{width}x{self.length}"


def core_shapes() -> list[Shape]:
    """Shapes of `h3lm bench core`: one size, from short rows to one row of a million."""
    return [Shape(rows, CORE_CHANNELS, length) for rows, length in CORE_SHAPES]


def small_shapes() -> list[Shape]:
    """Shapes that `h3lm bench core` measures in a CUDA graph."""
    return [Shape(rows, CORE_CHANNELS, length) for rows, length in SMALL_SHAPES]


def length_shapes() -> list[Shape]:
    """Shapes that differ in length alone."""
    return [Shape(SCALING_ROWS, CORE_CHANNELS, length) for length in SCALING_LENGTHS]


def width_shapes() -> list[Shape]:
    """Shapes that differ in the number of channels alone."""
    return [Shape(SCALING_ROWS, channels, SCALING_LENGTH) for channels in SCALING_CHANNELS]


def conv_shapes() -> list[Shape]:
    """Shapes of `h3lm bench conv`: one size, from short rows to one row of a million."""
    return [
        Shape(max(1, CONV_ELEMENTS // (CORE_CHANNELS * length)), CORE_CHANNELS, length)
        for length in CONV_LENGTHS
    ]


def figure_shapes() -> list[Shape]:
    """Shapes of the paper's Figure 2: batch 8, width 1024."""
    return [Shape(FIGURE_ROWS, FIGURE_CHANNELS, length) for length in FIGURE_LENGTHS]
