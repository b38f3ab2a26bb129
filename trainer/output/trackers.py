"""Where metrics and pictures go beside the run folder: wandb and TensorBoard.

A tracker has `log`, `picture`, `finish`, and `late`: what is lost where it does not finish in time.
"""

import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from trainer.config import Settings, as_dict
from trainer.output.settings import TRACKERS

GRACE = 2.0  # seconds after which a failure is no consequence of a stop
FINISH = 20.0  # seconds that a tracker has at the end; what wandb could not send by then stays in its folder


class Wandb:
    """A wandb run that continues under the id kept in the stage's folder; offline unless a key is set."""

    late = "`wandb sync` sends what is in its folder"

    def __init__(self, folder: Path, settings: Settings, step: int) -> None:
        import wandb

        kept = folder / "wandb_id"
        identity = (kept.read_text().strip() if kept.exists() else "") or secrets.token_hex(4)
        kept.write_text(identity + "\n")
        key = os.environ.get("WANDB_API_KEY")
        self.image = wandb.Image
        self.run = wandb.init(
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
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, line: dict[str, Any]) -> None:
        """A metrics line."""
        values = {f"{line['split']}/{k}": v for k, v in line.items() if k not in ("step", "split", "time")}
        self.run.log({"step": line["step"], **values})

    def picture(self, path: Path, step: int) -> None:
        """A PNG."""
        self.run.log({"step": step, f"pictures/{path.stem}": self.image(str(path))})

    def finish(self) -> None:
        """Nothing more comes."""
        self.run.finish()


class TensorBoard:
    """TensorBoard's event files, in `tensorboard/` of the stage's folder."""

    late = "its event files lack the last lines"

    def __init__(self, folder: Path, settings: Settings, step: int) -> None:
        from tensorboardX import SummaryWriter

        # What came after the step that a run goes on from is made again: TensorBoard then forgets the first.
        purge = step and step + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, filename_suffix=f".from-{step}")

    def log(self, line: dict[str, Any]) -> None:
        """A metrics line, at its own time."""
        for key, value in line.items():
            if key not in ("step", "split", "time") and isinstance(value, int | float):
                self.writer.add_scalar(f"{line['split']}/{key}", value, line["step"], walltime=line["time"])

    def picture(self, path: Path, step: int) -> None:
        """A PNG."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(f"pictures/{path.stem}", np.array(image.convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        """Nothing more comes."""
        self.writer.close()


class Apart:
    """A tracker in a thread of its own: where it or its server fails or hangs, the run neither stops nor waits."""

    def __init__(self, name: str, folder: Path, settings: Settings, step: int) -> None:
        self.name, self.kind = name, resolve_name(TRACKERS[name])
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self.stopping = threading.Event()  # a signal stopped the run, and most likely the tracker's own processes
        self._thread = threading.Thread(target=self._run, args=(folder, settings, step), name=name, daemon=True)
        self._thread.start()

    def log(self, line: dict[str, Any]) -> None:
        """Hand a metrics line on."""
        self._put(lambda tracker: tracker.log(line))

    def picture(self, path: Path, step: int) -> None:
        """Hand a PNG on."""
        self._put(lambda tracker: tracker.picture(path, step))

    def finish(self) -> None:
        """Wait for what is under way, at most `FINISH` seconds."""
        self._calls.put(None)
        self._thread.join(FINISH)
        if self._thread.is_alive():
            self._warn(f"has not finished after {FINISH:.0f} s; {self.kind.late}")

    def _put(self, call: Callable[[Any], None]) -> None:
        if self._thread.is_alive():
            self._calls.put(call)

    def _run(self, folder: Path, settings: Settings, step: int) -> None:
        try:
            tracker = self.kind(folder, settings, step)
            for call in iter(self._calls.get, None):
                call(tracker)
            tracker.finish()
        except BaseException as error:  # some of wandb's errors are no Exception
            if not self.stopping.wait(GRACE):
                self._warn(f"is left off ({' '.join(str(error).split())})")

    def _warn(self, what: str) -> None:
        print(f"warning: {self.name} {what}", file=sys.stderr, flush=True)
