"""Results kept as CSV."""

import csv
from pathlib import Path


def add_row(path: Path | None, row: dict[str, object]) -> None:
    """Add a row to a file, which begins with the names of its columns; to none where there is no path."""
    if path is None:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
