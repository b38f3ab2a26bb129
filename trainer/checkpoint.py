"""Sharded checkpoints: written aside, listed in a manifest with sizes and hashes, published by one rename.

A folder `checkpoints/step-00001000` holds DeepSpeed's shards and `manifest.json`; without a manifest that fits it is
not a checkpoint. Frozen weights are in none: they come from the teacher or the parent export.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from trainer.config import UserError
from trainer.engine import DeepSpeedEngine

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one stage of a run. All ranks call `save` and `restore` together; they share the folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`folder`: of the checkpoints; `keep`: how many of the newest stay."""
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        names = [path.name for path in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name))

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step-{step:08d}"

    def save(self, engine: DeepSpeedEngine, state: dict[str, Any]) -> None:
        """Publish a checkpoint of `state["step"]`, then remove all but the newest `keep`.

        Args:
            state: plain JSON: step, samples, world size, settings, lineage; it goes into the manifest.

        Raises:
            UserError: it cannot be written (no space left, say). Earlier checkpoints are as they were.
        """
        rank, final = dist.get_rank(), self.path(state["step"])
        aside = self.folder / f".writing-{final.name}"
        try:
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            dist.barrier()
            engine.save_checkpoint(str(aside), tag=final.name, save_latest=False, exclude_frozen_parameters=True)
            files = sorted(path for path in (aside / final.name).rglob("*") if path.is_file())
            listed: list[dict[str, Any]] = [{}] * dist.get_world_size()
            dist.all_gather_object(listed, {str(path.relative_to(aside / final.name)): _describe(path)
                                            for path in files[rank :: dist.get_world_size()]})  # fmt: skip
            if rank == 0:
                manifest = {**state, "files": {name: entry for part in listed for name, entry in sorted(part.items())}}
                _write_synced(aside / final.name / MANIFEST, json.dumps(manifest, indent=2).encode())
                shutil.rmtree(final, ignore_errors=True)
                os.replace(aside / final.name, final)
                shutil.rmtree(aside)
                for step in self.steps()[: -self.keep]:
                    shutil.rmtree(self.path(step))
            dist.barrier()
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
            shutil.rmtree(aside, ignore_errors=True)
            last = self.steps()
            again = f"the same command resumes from step {last[-1]}" if last else "the same command starts again"
            raise UserError(
                f"{final}: the checkpoint cannot be written ({_reason(error)}); make room, then {again}"
            ) from error

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its manifest; damaged ones are named on stderr and passed over."""
        for step in reversed(self.steps()):
            path = self.path(step)
            problem = verify(path)
            if problem is None:
                return path, json.loads((path / MANIFEST).read_text())
            print(f"warning: {path}: {problem}; passed over", file=sys.stderr, flush=True)
        return None

    def restore(self, engine: DeepSpeedEngine, found: tuple[Path, dict[str, Any]]) -> None:
        """Load weights and optimizer state of a checkpoint from `newest`.

        Raises:
            UserError: it was written by another number of ranks, or in another ZeRO stage.
        """
        path, manifest = found
        for what, now in (("world_size", dist.get_world_size()), ("zero_stage", engine.zero_optimization_stage())):
            if manifest[what] != now:
                raise UserError(f"{path}: was written with {what} {manifest[what]}, this is {now}; start as before")
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=path.name, load_module_strict=False)
        assert loaded is not None, f"DeepSpeed found nothing in {path}, though its files were verified"


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "has no readable manifest"
    for name, entry in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _describe(path / name) != entry:
            return f"{name} is not what was written"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    first = (str(error).splitlines() or [type(error).__name__])[0]
    of_torchs_writer = "PytorchStreamWriter" in first or "inline_container" in first
    return "no space left on device, or the file system failed" if of_torchs_writer else first
