"""Where a stage lies in a run folder, whether it is done, and how a file gets there; imports nothing heavy."""

import os
from pathlib import Path


def stage_path(run: str | Path, stage: str) -> Path:
    """`RUN/stage2`, or `RUN/probe`."""
    return Path(run) / (stage if stage == "probe" else f"stage{stage}")


def is_complete(path: Path) -> bool:
    """Whether the stage at `path` has written its export, or the probe its results."""
    return (path / "export" / "config.json").is_file() or (path / "results.json").is_file()


def is_begun(path: Path) -> bool:
    """Whether the stage at `path` has checkpoints, or features of a probe, and so settings that it was made with."""
    return any(any(path.glob(pattern)) for pattern in ("checkpoints/step-*", "features/*/*", "probes/*"))


def write_aside(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
