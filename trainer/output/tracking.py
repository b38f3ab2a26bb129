"""What a run reports: metrics.jsonl, other trackers, and a progress bar; where no one watches, a line now and then."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from trainer.config import Settings, UserError
from trainer.output.log import has_width
from trainer.output.trackers import Apart


class Tracker:
    """Rank 0 writes, the others are silent. Lines are flat JSON objects; those after the resumed step are dropped."""

    def __init__(self, folder: Path, settings: Settings, rank: int, step: int, steps: int) -> None:
        """Opens `folder/metrics.jsonl` to continue after `step` of `steps`.

        Raises:
            UserError: it cannot be written.
        """
        self.active, self.others, self.bar, self._evaluated = rank == 0, [], None, set()
        self.first_evaluation: dict[str, Any] | None = None  # before the first step; rank 0 knows
        if not self.active:
            return
        self.path, self.batch_size, self.step = folder / "metrics.jsonl", settings.train.batch_size, step
        try:
            self._keep_until(step)
            self.file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error, self.path) from error
        self.others = [Apart(name, folder, settings, step) for name in dict.fromkeys(settings.tracking)]
        unwatched = not has_width(sys.stderr)
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=unwatched, dynamic_ncols=True, file=sys.stderr)

    def _keep_until(self, step: int) -> None:
        """Drop lines of steps that will be made again, and whatever is no line of ours: one cut by a kill, say."""
        if not self.path.exists():
            return
        before, kept = self.path.read_bytes(), []
        for line in before.split(b"\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                continue
            # A run that starts from step 0 makes all lines again, the evaluation before the first step too.
            if 0 < step >= entry["step"]:
                kept.append(line + b"\n")
                if entry.get("split") == "val":
                    self._evaluated.add(entry["step"])
                    self._remember(entry)
        if b"".join(kept) != before:
            part = self.path.with_suffix(".part")
            part.write_bytes(b"".join(kept))
            os.replace(part, self.path)

    def was_evaluated(self, step: int) -> bool:
        """Whether the file already had a validation line of `step`; rank 0 knows."""
        return step in self._evaluated

    def log(self, line: dict[str, Any]) -> None:
        """One metrics line, with at least `step`, `epoch` and `split`. What is not finite becomes null.

        In the file it has `time` too, seconds since 1970.

        Raises:
            UserError: it cannot be written (no space left, say).
        """
        if not self.active:
            return
        line = {key: _finite(value) for key, value in line.items()}
        self._remember(line)
        timed = line | {"time": round(time.time(), 3)}
        self._write(self.file, self.path, timed)
        for other in self.others:
            other.log(timed)
        if line["split"] == "train" and not self.bar.disable:  # the bar itself shows steps and the time left
            speed = f"{line['images_per_second']:.0f} images/s  {line['data_wait']:.0%} waiting for data"
            speed += f"  {line['seconds_per_step']:.3g} s/step  {line['peak_memory_gib']:.1f} GiB"
            if "tflops" in line:
                mfu = "" if line["mfu"] is None else f"  MFU {line['mfu']:.0%}"
                speed += f"  {line['tflops']:.3g} TFLOP/s{mfu}"
            loss = float("nan") if line["loss"] is None else line["loss"]
            self.bar.set_postfix_str(f"loss {loss:.4g}  {speed}", refresh=False)
            return
        told = {k: v for k, v in line.items() if "." not in k}  # what is told of each block is in the file
        told = {k: v for k, v in told.items() if not (v is None and k.startswith("mfu"))}  # a CPU has none
        said = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()]
        if line["split"] == "train":
            left = (self.bar.total - line["step"]) * self.batch_size / line["images_per_second"]
            said.append(f"left {timedelta(seconds=round(left))}")
        self.info("  ".join(said))

    def started(self, **how: Any) -> None:
        """Note in `starts.jsonl` that a process group takes the stage on, at which step and `how`.

        Raises:
            UserError: it cannot be written.
        """
        if not self.active:
            return
        path = self.path.with_name("starts.jsonl")
        try:
            with path.open("ab", buffering=0) as file:
                self._write(file, path, {"time": round(time.time(), 3), "step": self.step, **how})
        except OSError as error:
            raise self._unwritable(error, path) from error

    def pictures(self, paths: Iterable[Path], step: int) -> None:
        """Hand PNGs to the other trackers."""
        for path in paths:
            for other in self.others:
                other.picture(path, step)

    def _write(self, file: IO[bytes], path: Path, line: dict[str, Any]) -> None:
        text = json.dumps(line).encode() + b"\n"
        try:
            while text:
                text = text[file.write(text) :]
        except OSError as error:
            raise self._unwritable(error, path) from error

    def _remember(self, line: dict[str, Any]) -> None:
        if line["split"] == "val" and line["step"] == 0:
            self.first_evaluation = line

    def warn(self, message: str, step: int) -> None:
        """A warning on the screen, and as a line of split `warning` in the metrics."""
        if self.active:
            line = {"step": step, "split": "warning", "message": message, "time": round(time.time(), 3)}
            self._write(self.file, self.path, line)
        self.info(f"warning: {message}")

    def advance(self) -> None:
        """One step was made."""
        if self.bar is not None:
            self.bar.update()

    def info(self, message: str) -> None:
        """A line for whoever watches."""
        if self.active:
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()

    def stopped(self, message: str) -> None:
        """A signal stopped the run: a line for whoever watches. Trackers whose processes it ended say no more."""
        for other in self.others:
            other.stopping.set()
        self.info(message)

    def close(self) -> None:
        """Flush everything."""
        if not self.active:
            return
        self.bar.close()
        self.file.close()
        for other in self.others:
            other.finish()

    def _unwritable(self, error: OSError, path: Path) -> UserError:
        reason = (error.strerror or str(error)).lower()
        return UserError(f"{path}: cannot be written ({reason}); mend that, then run the same command again")


def _finite(value: Any) -> Any:
    """Numbers and tensors of one as JSON holds them."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
