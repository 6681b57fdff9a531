"""How time and memory of the core grow with length and width: Proposition 1, measured."""

from collections.abc import Callable, Iterable
from pathlib import Path

from h3lm.bench.registry import Shape
from h3lm.bench.report import Row, exponent, plot_log_log

Points = dict[str, list[tuple[float, float]]]
TIME, MEMORY = "forward + backward ms", "extra bytes"


def points(
    shapes: Iterable[Shape], rows: list[Row], size: Callable[[Shape], int], what: str
) -> Points:
    """(size, value) of each path at each shape that has it."""
    by_name = {str(shape): size(shape) for shape in shapes}
    found: Points = {}
    for row in rows:
        value = row.get(what)
        if row["shape"] in by_name and isinstance(value, float):
            found.setdefault(str(row["path"]), []).append((by_name[str(row["shape"])], value))
    return found


def exponents(lengths: list[Shape], widths: list[Shape], rows: list[Row]) -> list[Row]:
    """For each path the powers of length and width that its time and memory grow with."""
    measured = {
        f"{name} by {axis}": points(shapes, rows, size, what)
        for axis, shapes, size in (
            ("L", lengths, lambda shape: shape.length),
            ("D", widths, lambda shape: shape.channels),
        )
        for name, what in (("time", TIME), ("memory", MEMORY))
    }
    paths = dict.fromkeys(path for found in measured.values() for path in found)
    return [
        {"path": path}
        | {column: exponent(found[path]) for column, found in measured.items() if path in found}
        for path in paths
    ]


def plot(path: Path, lengths: list[Shape], rows: list[Row], roof: Callable[[Row], float]) -> None:
    """Time of forward and backward against length, all paths and the roof, as a PNG."""
    curves = points(lengths, rows, lambda shape: shape.length, TIME)
    roofs = [row | {"path": "roof", TIME: roof(row)} for row in rows]
    curves["roof"] = points(lengths, roofs, lambda shape: shape.length, TIME)["roof"]
    plot_log_log(path, curves, "length", "forward + backward, ms")
