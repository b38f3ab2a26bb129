"""What a stage's folder keeps of how it was made; imports nothing heavy."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import Settings, UserError, as_dict, first_difference, read_yaml
from trainer.output.paths import is_begun, is_complete

COMMAND = "command.txt"  # what was typed when the stage was begun


def check_kept(path: Path, settings: Settings) -> None:
    """Raises UserError, naming the field, when the stage at `path` was begun with other settings."""
    kept = path / "config.yaml"
    if not kept.is_file() or not (is_complete(path) or is_begun(path)):
        return  # other settings would spoil nothing
    try:
        before = read_yaml(kept)
    except UserError as error:
        raise UserError(f"{kept}: damaged; remove {path} to start again") from error
    difference = first_difference(before, json.loads(json.dumps(as_dict(settings))))
    if difference:
        raise UserError(f"{path}: was made with other settings: {difference}; use another --run, or the old value")


def evaluations(path: Path) -> list[dict[str, Any]]:
    """The lines of split `val` in the metrics of the stage at `path`, in their order; none where there are none."""
    found = []
    try:
        lines = (path / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        if isinstance(entry, dict) and entry.get("split") == "val":
            found.append(entry)
    return found


def without_folders(argv: Sequence[str]) -> str:
    """A command as it may be shown to others: of a path that leads from the root or from home the last name alone."""

    def short(word: str) -> str:
        option, of, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if value.startswith(("/", "~")):
            return f"{option}{of}{Path(value).name or value}"
        return re.sub(r"(?<![\w.~-])(?:/|~/)[^\s,\]}'\"]*/([^/\s,\]}'\"]+)", r"\1", word)

    return shlex.join(["python", "trainer/run.py", *(short(word) for word in argv)])


def kept_command(path: Path) -> str | None:
    """What was typed when the stage at `path` was begun; None where that is not known."""
    try:
        return (path / COMMAND).read_text().strip()
    except OSError:
        return None
