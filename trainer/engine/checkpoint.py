"""Sharded checkpoints: written aside, with sizes and hashes in a manifest, and published by one rename.

A folder `checkpoints/step-00001000` holds a safetensors file per rank and `manifest.json`; without a manifest that fits
it is no checkpoint. Each file names the elements of the parameters that it holds, so a run resumes at any world size
and ZeRO stage. Nothing is unpickled. Frozen weights are in no file: they come from the teacher or the parent.
"""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import UserError
from trainer.engine.engine import DeepSpeedEngine
from trainer.engine.shards import Run, Shards
from trainer.ranks import shared
from trainer.ranks.errors import cause
from trainer.ranks.world import dist

MANIFEST = "manifest.json"
ASIDE = ".writing-"  # prefix of a checkpoint that is being written
BUFFER = "buffer"  # state of the model that no optimizer owns, such as a batch norm's running mean
Manifest = dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage of a run, in a folder that the ranks share. All ranks call each method together.

    A save has two halves. `begin` copies the state and starts a thread that writes it. `publish` waits for the files of
    all ranks and makes them a checkpoint.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """`folder`: of the checkpoints; `keep`: how many of the newest stay, beside the best."""
        self.folder, self.keep = folder, keep
        self._writer: _Writer | None = None

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        names = [path.name for path in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step-{step:08d}"

    @property
    def pending(self) -> bool:
        """Whether a save was begun that is not published yet; the same on all ranks."""
        return self._writer is not None

    @property
    def written(self) -> bool:
        """Whether this rank's file of the pending save is there."""
        return self._writer is not None and not self._writer.is_alive()

    def begin(self, engine: DeepSpeedEngine, state: Manifest) -> None:
        """Copy what is to be saved, and start to write it. A save that is still pending is published first.

        Args:
            state: plain JSON for the manifest: at least `step`; `score`, higher is better, if it was evaluated.
        """
        self.publish()
        shards = Shards(engine)
        tensors = {f"{key}:{run.start}:{run.name}": value.to("cpu", copy=True) for run, key, value in shards.states()}
        if dist.get_rank() == 0:
            kept = engine.module.state_dict().keys()
            buffers = {name: value for name, value in engine.module.named_buffers() if name in kept}
            tensors |= {f"{BUFFER}:0:{name}": value.flatten().to("cpu", copy=True) for name, value in buffers.items()}
        state = state | {"optimizer_step": shards.optimizer_step(), "world_size": dist.get_world_size()}
        self._writer = _Writer(self.folder / f"{ASIDE}{self.path(state['step']).name}", tensors, state)
        self._writer.start()

    def publish(self) -> None:
        """Wait until all ranks have written, make their files the newest checkpoint, and remove old ones.

        Raises:
            UserError, on all ranks: it cannot be written (no space left, say), or the ranks write to different folders.
                Earlier checkpoints stay as they were.
        """
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        writer.join()
        aside, final = writer.folder, self.path(writer.state["step"])
        written: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(written, (socket.gethostname(), writer.files, writer.error))
        assert all(files or error for _, files, error in written), "a writer died, its traceback is above"
        outcome: list[Any] = [None]
        if dist.get_rank() == 0:
            outcome = [next((f"rank {rank}: {error}" for rank, (*_, error) in enumerate(written) if error), None)]
            outcome = [outcome[0] or _not_shared(aside, written)]
            if outcome[0] is None:
                try:
                    files = {name: entry for _, theirs, _ in written for name, entry in theirs.items()}
                    self._publish(aside, final, writer.state, files)
                except OSError as error:
                    outcome = [cause(error)]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            shutil.rmtree(aside, ignore_errors=True)  # on all ranks: each may have another folder of this name
            last = self.steps()
            again = f"it resumes from step {last[-1]}" if last else "it starts again, as no checkpoint is there yet"
            raise UserError(f"{final}: the checkpoint cannot be written ({outcome[0]}); {again}")

    def _publish(self, aside: Path, final: Path, state: Manifest, files: dict[str, Any]) -> None:
        manifest = state | {"files": files}
        manifest["sha256"] = digest(manifest)
        _write_synced(aside / MANIFEST, json.dumps(manifest, indent=2))
        _sync_folder(aside)
        shutil.rmtree(final, ignore_errors=True)  # damaged, and passed over when the run was resumed
        os.replace(aside, final)
        _sync_folder(self.folder)
        best = self._best()
        for name, step in (("best", best), ("latest", state["step"])):
            if step is not None:
                _write_synced(self.folder / f".{name}", self.path(step).name + "\n")
                os.replace(self.folder / f".{name}", self.folder / name)
        older = [step for step in self.steps() if step < state["step"]]
        kept = {state["step"], best, *older[max(0, len(older) - self.keep + 1) :]}
        for step in self.steps():  # later ones were damaged and passed over
            if step not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def _best(self) -> int | None:
        scores = {}
        for step in self.steps():
            manifest = _read_manifest(self.path(step))
            if manifest is not None and manifest.get("score") is not None and math.isfinite(manifest["score"]):
                scores[step] = manifest["score"]
        return max(scores, key=scores.get) if scores else None

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest complete checkpoint and its manifest. Damaged ones are named on stderr and skipped.

        The ranks share the work of comparing files with their hashes, and of looking what each holds: the manifest's
        files have it as `holds`, {name of an entry: its elements}. So no rank opens all files.
        """
        steps = [None]
        if dist.get_rank() == 0:
            for left in self.folder.glob(f"{ASIDE}*"):
                shutil.rmtree(left, ignore_errors=True)
            steps = [self.steps()]
        dist.broadcast_object_list(steps, src=0)
        for step in reversed(steps[0]):
            path = self.path(step)
            found: list[Any] = [None] * dist.get_world_size()
            problem = verify(path, dist.get_rank(), dist.get_world_size())
            held = {} if problem else _held_by_share(path, dist.get_rank(), dist.get_world_size())
            dist.all_gather_object(found, (problem, held))
            problem = next((p for p, _ in found if p), None)
            if problem is None:
                manifest = _read_manifest(path)
                for _, held in found:
                    for name, holds in held.items():
                        manifest["files"][name]["holds"] = holds
                return path, manifest
            if dist.get_rank() == 0:
                print(f"warning: {path}: {problem}; passed over", file=sys.stderr, flush=True)
        return None

    def restore(self, engine: DeepSpeedEngine, found: tuple[Path, Manifest]) -> None:
        """Load weights, optimizer state and averages of a checkpoint from `newest`, whatever wrote it."""
        path, manifest = found
        files = Files(path, manifest["files"])
        Shards(engine).restore(files.read, files.keys - {BUFFER}, manifest["optimizer_step"])
        with torch.no_grad():
            for name, buffer in engine.module.named_buffers():
                if (BUFFER, name) in files.runs:
                    buffer.copy_(files.read(Run(name, 0, buffer.numel(), 0, 0), BUFFER).view(buffer.shape))
        engine.global_steps = manifest["step"]
        engine.skipped_steps = manifest["step"] - manifest["optimizer_step"]
        engine.global_samples = manifest["samples"]
        engine.micro_steps = manifest["step"] * engine.gradient_accumulation_steps()


class _Writer(threading.Thread):
    """Writes this rank's file; afterwards `files` describes it, or `error` says why not."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], state: Manifest) -> None:
        super().__init__(daemon=True)
        self.folder, self.tensors, self.state = folder, tensors, state
        self.files: dict[str, Any] = {}
        self.error: str | None = None

    def run(self) -> None:
        path = self.folder / f"rank-{dist.get_rank():05d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(self.tensors, path)
            self.files = {path.name: _describe(path)}
        except (OSError, SafetensorError, MemoryError) as error:
            self.error = cause(error)
        self.tensors = {}


class Files:
    """Reads ranges of elements from a checkpoint's files, however they were divided; opens those that it reads."""

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        """`files`: the manifest's, with what each holds."""
        self.folder, self.opened = folder, {}
        # (state, parameter) -> [(first element, behind the last, file, name in it)]
        self.runs: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for name, entry in files.items():
            for stored, numel in entry["holds"].items():
                key, start, parameter = stored.split(":", 2)
                self.runs.setdefault((key, parameter), []).append((int(start), int(start) + numel, name, stored))
        self.keys = {key for key, _ in self.runs}

    def read(self, run: Run, key: str) -> Tensor:
        """Elements `run.start` to `run.start + run.numel` of a parameter's state, flat."""
        parts, at, end = [], run.start, run.start + run.numel
        for start, stop, name, entry in sorted(self.runs.get((key, run.name), [])):
            stop = min(stop, end)
            if start <= at < stop:
                if name not in self.opened:
                    self.opened[name] = safe_open(self.folder / name, framework="pt")
                parts.append(self.opened[name].get_slice(entry)[at - start : stop - start])
                at = stop
        assert at == end, f"{key} of {run.name}: elements {at} to {end} are in no file"
        return torch.cat(parts)


def _held_by_share(path: Path, rank: int, world_size: int) -> dict[str, dict[str, int]]:
    """What this rank's share of the files holds, by file: {name of an entry: its elements}."""
    held = {}
    for name in sorted(_read_manifest(path)["files"])[rank::world_size]:
        with safe_open(path / name, framework="pt") as file:
            held[name] = {entry: file.get_slice(entry).get_shape()[0] for entry in file.keys()}  # noqa: SIM118
    return held


def verify(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, or None. Each rank reads its share of the files."""
    manifest = _read_manifest(path)
    if manifest is None:
        return f"has no readable {MANIFEST}"
    for name, entry in sorted(manifest["files"].items())[rank::world_size]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if _describe(path / name) != entry:
            return f"{name} is not what was written"
    return None


def _read_manifest(path: Path) -> Manifest | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return manifest if manifest.pop("sha256") == digest(manifest) else None
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None


def digest(manifest: Manifest) -> str:
    """The hash of a manifest, which the manifest itself contains."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, read back after it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _not_shared(folder: Path, written: list[tuple[str, dict[str, Any], str | None]]) -> str | None:
    """Which ranks wrote to another folder of this name, where their nodes share no file system; or None."""
    until, apart = time.monotonic() + shared.VISIBLE, []
    for rank, (host, files, _) in enumerate(written):
        if not all(shared.is_seen(folder / name, entry["size"], until) for name, entry in files.items()):
            apart.append((rank, host))
    return f"the folder {shared.not_shared(written[0][0], apart)}" if apart else None


def _write_synced(path: Path, content: str) -> None:
    with path.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
