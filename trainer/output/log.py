"""The screen, and `log.txt` of a stage's folder: what libraries say, and the details of each start.

The screen has the libraries' warnings and errors alone. Python's own warnings, which are for who writes code, go to the
file.
"""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LIBRARIES = ("DeepSpeed", "wandb", "py.warnings")  # names of their loggers


class Log:
    """Rank 0's `log.txt`, which goes on where an earlier start left it; the other ranks write none.

    Within its context libraries log there. Where it cannot be written they are silent: a log stops no run.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / "log.txt"
        self._handler: logging.Handler = _File(self.path, delay=True) if rank == 0 else logging.NullHandler()
        self._handler.setLevel(logging.INFO)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def __enter__(self) -> "Log":
        for logger in map(logging.getLogger, LIBRARIES):
            for screen in logger.handlers:
                screen.setLevel(max(screen.level, logging.WARNING))
            logger.addHandler(self._handler)
        logging.getLogger("DeepSpeed").setLevel(logging.INFO)
        logging.getLogger("py.warnings").propagate = False
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        logging.captureWarnings(False)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        for logger in map(logging.getLogger, LIBRARIES):
            logger.removeHandler(self._handler)
        with contextlib.suppress(OSError):
            self._handler.close()

    def note(self, line: str) -> None:
        """A line of ours."""
        self._handler.handle(logging.LogRecord("unsoftmax", logging.INFO, "", 0, line, None, None))

    @contextlib.contextmanager
    def printed(self) -> Iterator[None]:
        """Within it the file gets what is printed to stdout: DeepSpeed says so what it has built."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                yield
        finally:
            for line in said.getvalue().splitlines():
                self.note(line)


def has_width(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that a bar can be drawn on: some containers' and CI's have no columns."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """The disk is full, say."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it cannot be opened
            self.handleError(record)
