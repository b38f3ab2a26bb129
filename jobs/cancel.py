"""`python -m jobs.cancel RUN`: stop and save what runs, and take out of the queue what waits."""

import os
import signal
import sys

from jobs import slurm
from jobs.records import find, typed_run
from jobs.report import state_of
from trainer.config import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 when nothing was submitted for the run or Slurm refuses."""
    try:
        run = typed_run(argv, "cancel", "Cancel a run's jobs.")
        records, jobs = find(run)
        live = [submitted for submitted in jobs if state_of(submitted, records, {})[0] in slurm.LIVE]
        on_slurm = [submitted.job for submitted in live if submitted.executor == "slurm"]
        if on_slurm:
            slurm.cancel(on_slurm)
        for submitted in live:
            if submitted.executor == "local":
                os.kill(int(submitted.job), signal.SIGTERM)  # its controller passes it to the ranks, which save
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = ", ".join(f"job {submitted.job} (stage {submitted.stage})" for submitted in live)
    print(f"cancelled: {said}; the command that submitted them resumes them" if said else f"{run}: no job to cancel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
