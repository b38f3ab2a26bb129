"""One HTML page of what run folders hold: `python -m trainer.report RUN [RUN ...]`."""

from trainer.report.page import report
