"""A stage's folder in a run: one process group at a time, and the same settings throughout."""

import json
import os
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from torch import Tensor

import models
from trainer.config import Settings, UserError, as_dict, first_difference, read_yaml, run_recipe
from trainer.output.paths import hold, is_begun, is_complete, stage_path, write_aside
from trainer.ranks.errors import cause

PATIENCE = 240.0  # seconds that a requeued job waits for its former self on a lost node


class StageFolder:
    """`RUN/stage2`: config.yaml, metrics.jsonl, checkpoints/ and, when the stage is done, export/."""

    def __init__(self, settings: Settings) -> None:
        """Reads and writes nothing."""
        self.run = Path(settings.run)
        self.path = stage_path(settings.run, settings.stage)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self._lock = None

    def check(self, settings: Settings) -> None:
        """Raises UserError, naming the field, when the folder belongs to a run with other settings."""
        kept = self.path / "config.yaml"
        if not kept.is_file() or not (self.complete or is_begun(self.path)):
            return  # other settings would spoil nothing
        try:
            before = read_yaml(kept)
        except UserError as error:
            raise UserError(f"{kept}: damaged; remove {self.path} to start again") from error
        difference = first_difference(before, json.loads(json.dumps(as_dict(settings))))
        if difference:
            raise UserError(
                f"{self.path}: was made with other settings: {difference}; use another --run, or the old value"
            )

    def claim(self, settings: Settings, rank: int) -> None:
        """Rank 0 takes the folder until the process ends, and records the settings, for later stages too.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        if rank != 0:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.path, PATIENCE if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else 0)
            write_aside(self.path / "config.yaml", yaml.safe_dump(as_dict(settings), sort_keys=False))
            if not (self.run / "recipe.yaml").exists():
                write_aside(self.run / "recipe.yaml", run_recipe(settings))
        except BlockingIOError as error:
            raise UserError(
                f"{self.path}: another process is running this stage; wait for it, or use another --run"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({cause(error)})") from error

    def write_export(self, state: dict[str, Tensor], config: dict[str, Any]) -> None:
        """Write the export.

        Raises:
            UserError: it cannot be written (no space left, say).
        """
        try:
            models.save(self.export, state, config)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.export}: cannot be written ({cause(error)})") from error

    def exported(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The lineage of the export, and the settings that it was made with."""
        return models.read_config(self.export)["lineage"], read_yaml(self.path / "config.yaml")

    @property
    def complete(self) -> bool:
        """Whether the stage has written its export, or the probe its results."""
        return is_complete(self.path)
