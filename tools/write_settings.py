"""Writes docs/settings.md from the settings themselves: `python -m tools.write_settings`."""

import dataclasses
import json
from pathlib import Path

from jobs.settings import Request
from trainer.config import Settings, explained, names
from trainer.fields import words

ROOT = Path(__file__).parents[1]


def table(kind: type, prefix: str = "") -> str:
    """A Markdown table of a dataclass's own fields: name, type, default, explanation."""
    types, told = dict(names(kind)), dict(explained(kind))
    lines = ["| setting | must be | default | |", "|---|---|---|---|"]
    for f in dataclasses.fields(kind):
        if f.name in types:
            cells = f"`--{prefix}{f.name}`", words(f.type), _default(f), told[f.name]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _default(f: dataclasses.Field) -> str:
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return "" if value is dataclasses.MISSING else f"`{json.dumps(value)}`"


def page() -> str:
    """The text of docs/settings.md."""
    parts = [
        "# Settings",
        "This page is written by `python -m tools.write_settings` from the code. A recipe's YAML holds the same names; "
        "its section `stages` holds what differs per stage.",
        "## Of every stage",
        table(Settings),
    ]
    for f in dataclasses.fields(Settings):
        if dataclasses.is_dataclass(f.type):
            parts += [f"## {f.name}", f.type.__doc__, table(f.type, f"{f.name}.")]
    parts += ["## Jobs", "What `python -m jobs.submit` and `trainer/run.py --cluster` take.", table(Request)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/settings.md").write_text(page())
