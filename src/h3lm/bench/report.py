"""Results of benchmarks as JSON and Markdown."""

import json
from pathlib import Path

Row = dict[str, str | float]


def write(
    name: str, folder: Path, environment: dict[str, str], notes: str, rows: list[Row]
) -> Path:
    """Write `name`.json and `name`.md into a folder and return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "notes": notes, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    path = folder / f"{name}.md"
    path.write_text(markdown(name, environment, notes, rows))
    return path


def markdown(name: str, environment: dict[str, str], notes: str, rows: list[Row]) -> str:
    """One table, under what it was measured on."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in environment.items()), ""]
    lines += [notes, "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"
