"""The page: what `read` found, put into sections, and written through the template. Nothing here imports torch."""

import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.config import UserError
from trainer.output.paths import write_aside
from trainer.report.comparison import comparison
from trainer.report.read import RunRecord, StageRecord
from trainer.report.sections import SECTIONS, missing
from trainer.report.words import Section, percent


def report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of `runs` to `out`; several are compared.

    Raises:
        UserError: a run folder is not there or has no stage in it, or the page cannot be written.
    """
    names = _names(runs)
    records = [RunRecord(path, name) for path, name in zip(runs, names, strict=True)]
    for record in records:
        if not record.path.is_dir():
            raise UserError(f"{record.path}: no such run folder; give the folder that --run named")
        if not record.begun and not record.probe and not record.evaluation:
            raise UserError(f"{record.path}: holds no stage of a run; give the folder that --run named")
    softmax = next((record for record in records if record.stages[2].is_baseline), None)
    for record in records:
        record.baseline = None if record is softmax else softmax
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = percent
    content = {
        "runs": [_run(record) for record in records],
        "comparison": comparison(records) if len(records) > 1 else None,
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, environment.get_template("page.html").render(content))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({(error.strerror or str(error)).lower()}); use --out") from error
    return out


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names, all different: the folder's, with its parent's where two are alike."""
    whole = [path.resolve() for path in runs]
    for parts in range(1, 9):
        names = ["/".join(path.parts[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(whole, 1)]


def _run(run: RunRecord) -> Section:
    """All sections of a run; one that cannot be made of what is there says so."""
    made: Section = {"name": run.name, "path": str(run.path), "stages": [_pill(stage) for stage in run.stages]}
    failed = []
    for name, make in SECTIONS.items():
        try:
            made[name] = make(run)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError) as error:
            made[name] = None
            failed.append(f"{run.path}: the section {name!r} cannot be made of it ({type(error).__name__}: {error})")
    made["missing"] = [*missing(run), *({"what": line, "how": None} for line in (*run.problems, *failed))]
    return made


def _pill(stage: StageRecord) -> Section:
    step, steps = stage.progress
    at = f"step {step} of {steps}" if steps else f"step {step}"
    return {"number": stage.stage, "title": stage.title, "state": stage.state, "at": at}
