"""What a run reports: metrics.jsonl, wandb, and a progress bar; where no one watches, a line now and then."""

import json
import math
import os
import queue
import secrets
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainer.config import Settings, UserError, as_dict

FINISH = 20.0  # seconds that wandb has at the end; what it could not send by then stays in its folder


class Tracker:
    """Rank 0 writes, the others are silent. Lines are flat JSON objects; those after the resumed step are dropped."""

    def __init__(self, folder: Path, settings: Settings, rank: int, step: int, steps: int) -> None:
        """Opens `folder/metrics.jsonl` to continue after `step` of `steps`.

        Raises:
            UserError: it cannot be written.
        """
        self.active, self.wandb, self.bar, self._evaluated = rank == 0, None, None, set()
        self.first_evaluation: dict[str, Any] | None = None  # before the first step; rank 0 knows
        if not self.active:
            return
        self.path, self.batch_size = folder / "metrics.jsonl", settings.train.batch_size
        try:
            self._keep_until(step)
            self.file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        if settings.wandb.enabled:
            self.wandb = _Wandb(folder, settings)
        # None: shown on a terminal only.
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True, file=sys.stderr)

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

        Raises:
            UserError: it cannot be written (no space left, say).
        """
        if not self.active:
            return
        line = {key: _finite(value) for key, value in line.items()}
        self._remember(line)
        self._write(line)
        if self.wandb is not None:
            self.wandb.log(line)
        if line["split"] == "train" and not self.bar.disable:  # the bar itself shows steps and the time left
            speed = f"{line['images_per_second']:.0f} images/s  {line['data_wait']:.0%} waiting for data"
            loss = float("nan") if line["loss"] is None else line["loss"]
            self.bar.set_postfix_str(f"loss {loss:.4g}  {speed}", refresh=False)
            return
        said = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()]
        if line["split"] == "train":
            left = (self.bar.total - line["step"]) * self.batch_size / line["images_per_second"]
            said.append(f"left {timedelta(seconds=round(left))}")
        self.info("  ".join(said))

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line).encode() + b"\n"
        try:
            while text:
                text = text[self.file.write(text) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def _remember(self, line: dict[str, Any]) -> None:
        if line["split"] == "val" and line["step"] == 0:
            self.first_evaluation = line

    def warn(self, message: str, step: int) -> None:
        """A warning on the screen, and as a line of split `warning` in the metrics."""
        if self.active:
            self._write({"step": step, "split": "warning", "message": message})
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

    def close(self) -> None:
        """Flush everything."""
        if not self.active:
            return
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _unwritable(self, error: OSError) -> UserError:
        reason = (error.strerror or str(error)).lower()
        return UserError(f"{self.path}: cannot be written ({reason}); mend that, then run the same command again")


def _finite(value: Any) -> Any:
    """Numbers and tensors of one as JSON holds them."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Wandb:
    """wandb in a thread of its own: where it or its server fails or hangs, the run neither stops nor waits."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(folder, settings), name="wandb", daemon=True)
        self._thread.start()

    def log(self, line: dict[str, Any]) -> None:
        if self._thread.is_alive():
            self._lines.put(line)

    def finish(self) -> None:
        self._lines.put(None)
        self._thread.join(FINISH)
        if self._thread.is_alive():
            _warn(f"has not finished after {FINISH:.0f} s; `wandb sync` sends what is in its folder")

    def _run(self, folder: Path, settings: Settings) -> None:
        try:
            run = _start_wandb(folder, settings)
            for line in iter(self._lines.get, None):
                values = {f"{line['split']}/{k}": v for k, v in line.items() if k not in ("step", "split")}
                run.log({"step": line["step"], **values})
            run.finish()
        except BaseException as error:  # some of its errors are no Exception
            _warn(f"is left off ({' '.join(str(error).split())})")


def _warn(what: str) -> None:
    print(f"warning: wandb {what}", file=sys.stderr, flush=True)


def _start_wandb(folder: Path, settings: Settings):
    """A wandb run that continues under the id kept in the run folder; offline unless a key is set."""
    import wandb

    kept = folder / "wandb_id"
    identity = (kept.read_text().strip() if kept.exists() else "") or secrets.token_hex(4)
    kept.write_text(identity + "\n")
    key = os.environ.get("WANDB_API_KEY")
    run = wandb.init(
        project=settings.wandb.project,
        id=identity,
        resume="allow",
        name=f"{folder.parent.name}/{folder.name}",
        group=folder.parent.name,
        dir=folder,
        config=as_dict(settings),
        mode=os.environ.get("WANDB_MODE") or ("online" if key else "offline"),
        settings=wandb.Settings(console="off", silent=True, init_timeout=60),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
