"""`python -m trainer.report RUN [RUN ...] [--out FILE]`: one self-contained HTML page of what run folders hold."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from trainer.config import UserError
from trainer.report.page import report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.prog} RUN [RUN ...] [--out FILE]")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 on a user's mistake."""
    parser = _Parser(
        prog="python -m trainer.report",
        description="Write one HTML page of what run folders hold; several runs are compared.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, finished or not")
    parser.add_argument("--out", metavar="FILE", help="the page; by default RUN/report.html of the first run")
    try:
        typed = parser.parse_args(argv)
        out = Path(typed.out).expanduser() if typed.out else Path(typed.runs[0]).expanduser() / "report.html"
        print(f"report: {report([Path(run).expanduser() for run in typed.runs], out)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
