"""Where a stage lies in a run folder, and whether it is done; imports nothing heavy."""

from pathlib import Path


def stage_path(run: str | Path, stage: str) -> Path:
    """`RUN/stage2`, or `RUN/probe`."""
    return Path(run) / (stage if stage == "probe" else f"stage{stage}")


def is_complete(path: Path) -> bool:
    """Whether the stage at `path` has handed on its export, or the probe its results."""
    return (path / "export" / "config.json").is_file() or (path / "results.json").is_file()
