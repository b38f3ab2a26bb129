"""`python -m jobs.status RUN`: a line per stage."""

import dataclasses
import sys

from jobs.records import find, typed_run
from jobs.report import Line, lines
from trainer.config import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 when nothing was submitted for the run."""
    try:
        print(table(lines(*find(typed_run(argv, "status", "Show a run's jobs, a line per stage.")))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table(found: list[Line]) -> str:
    """The lines under their headings, without columns that are empty throughout."""
    names = [field.name for field in dataclasses.fields(Line)]
    rows = [names, *([getattr(line, name) for name in names] for line in found)]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    texts = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in zip(*columns, strict=True)
    ]
    return "\n".join(text.rstrip() for text in texts)


if __name__ == "__main__":
    sys.exit(main())
