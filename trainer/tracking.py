"""What a run says: metrics.jsonl, wandb, and a progress bar or, where no one watches, a line now and then."""

import json
import os
import secrets
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import Settings, as_dict


class Tracker:
    """Rank 0 writes, the others are silent. Lines are flat JSON objects; those after the resumed step are dropped."""

    def __init__(self, folder: Path, settings: Settings, rank: int, step: int, steps: int) -> None:
        """Opens `folder/metrics.jsonl` to continue after `step` of `steps`."""
        self.active, self.wandb, self.bar = rank == 0, None, None
        if not self.active:
            return
        self.path, self.batch_size = folder / "metrics.jsonl", settings.train.batch_size
        self._keep_until(step)
        self.file = self.path.open("a", buffering=1)
        if settings.wandb.enabled:
            self.wandb = _start_wandb(folder, settings)
        # None: shown on a terminal only.
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True, file=sys.stderr)

    def _keep_until(self, step: int) -> None:
        """Drop lines of steps that will be made again, and a last line cut by a kill."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            # What is judged at the start of a run is judged again only when it starts from step 0.
            if entry["step"] < step or (entry["step"] == step and step > 0):
                kept.append(line + "\n")
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept))
        os.replace(part, self.path)

    def log(self, line: dict[str, Any]) -> None:
        """One metrics line, with at least `step`, `epoch` and `split`."""
        if not self.active:
            return
        self.file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            step, split = line["step"], line["split"]
            values = {f"{split}/{k}": v for k, v in line.items() if k not in ("step", "split")}
            try:
                self.wandb.log({"step": step, **values})
            except Exception as error:
                print(f"warning: wandb failed and is left off from here ({error})", file=sys.stderr, flush=True)
                self.wandb = None
        if line["split"] == "train" and not self.bar.disable:  # the bar itself shows steps and the time left
            speed = f"{line['images_per_second']:.0f} images/s  {line['data_wait']:.0%} waiting for data"
            loss = float("nan") if line["loss"] is None else line["loss"]
            self.bar.set_postfix_str(f"loss {loss:.4g}  {speed}", refresh=False)
            return
        said = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()]
        if line["split"] == "train":
            left = (self.bar.total - line["step"]) * self.batch_size / line["images_per_second"]
            said.append(f"left {timedelta(seconds=round(left))}")
        self.say("  ".join(said))

    def advance(self) -> None:
        """One step was made."""
        if self.bar is not None:
            self.bar.update()

    def say(self, message: str) -> None:
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
            try:
                self.wandb.finish()
            except Exception as error:
                print(f"warning: wandb did not finish ({error})", file=sys.stderr, flush=True)


def _start_wandb(folder: Path, settings: Settings):
    """A wandb run that continues under the id kept in the run folder; offline unless a key is set. None if it fails."""
    try:
        import wandb

        kept = folder / "wandb_id"
        identity = kept.read_text().strip() if kept.exists() else secrets.token_hex(4)
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
    except Exception as error:
        print(f"warning: wandb is left off ({error})", file=sys.stderr, flush=True)
        return None
