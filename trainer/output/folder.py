"""A stage's folder in a run: one process group at a time, and the same settings throughout."""

import os
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from torch import Tensor

import models
from trainer.config import Settings, UserError, as_dict, read_yaml, run_recipe
from trainer.output.kept import COMMAND, check_kept, evaluations, kept_command, without_folders
from trainer.output.paths import hold, is_begun, is_complete, stage_path, write_aside
from trainer.ranks.errors import cause

PATIENCE = 240.0  # seconds that a requeued job waits for its former self on a lost node


class StageFolder:
    """`RUN/stage2`: config.yaml, command.txt, metrics.jsonl, checkpoints/ and, when the stage is done, export/."""

    def __init__(self, settings: Settings) -> None:
        """Reads and writes nothing."""
        self.run = Path(settings.run)
        self.path = stage_path(settings.run, settings.stage)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self._lock = None

    def check(self, settings: Settings) -> None:
        """Raises UserError, naming the field, when the folder belongs to a run with other settings."""
        check_kept(self.path, settings)

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
            if not is_begun(self.path):
                write_aside(self.path / COMMAND, without_folders(settings.typed) + "\n")
            write_aside(self.path / "config.yaml", yaml.safe_dump(as_dict(settings), sort_keys=False))
            if not (self.run / "recipe.yaml").exists():
                write_aside(self.run / "recipe.yaml", run_recipe(settings))
        except BlockingIOError as error:
            raise UserError(
                f"{self.path}: another process is running this stage; wait for it, or use another --run"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({cause(error)})") from error

    def write_export(self, state: dict[str, Tensor], config: dict[str, Any], settings: Settings) -> None:
        """Write the export, with its model card.

        Raises:
            UserError: it cannot be written (no space left, say).
        """
        try:
            self.export.mkdir(parents=True, exist_ok=True)
            write_aside(self.export / models.CARD, self._card(config, settings))
            models.save(self.export, state, config)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.export}: cannot be written ({cause(error)})") from error

    def _card(self, config: dict[str, Any], settings: Settings) -> str:
        """The text of the model card: figures of the last evaluation, and the commands of the run's stages up to it."""
        teacher, found = settings.teacher, evaluations(self.path)
        stages = [stage for stage in (config.get("lineage") or {}).get("stages", ()) if stage != settings.stage]
        commands = [kept_command(stage_path(self.run, stage)) for stage in [*stages, settings.stage]]
        published = teacher.pretrained and teacher.weights is None and teacher.name is not None
        return models.model_card(
            config,
            licence=models.licence_of(teacher.name) if published else None,
            figures=found[-1] if found else None,
            measured_on=Path(settings.data.val or settings.data.train).name,
            commands=[command for command in commands if command],
        )

    def exported(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The lineage of the export, and the settings that it was made with."""
        return models.read_config(self.export)["lineage"], read_yaml(self.path / "config.yaml")

    @property
    def complete(self) -> bool:
        """Whether the stage has written its export, or the probe its results."""
        return is_complete(self.path)
