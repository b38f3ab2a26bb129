"""One command for the chain: `python -m jobs.submit --config RECIPE --nodes 2 --gpus_per_node 8 [...]`.

Each stage is a job, which waits for the one before. A stage that is complete is not run again, and a stage in the queue
is not submitted twice. So the same command resumes whatever is missing.
"""

import shlex
import sys

from jobs import batch, here, slurm
from jobs.plan import Chain, check, graph, plan
from jobs.records import Records
from jobs.settings import parse
from trainer.config import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 after a user's mistake, in one line; the status of a stage that ran here and failed."""
    try:
        requests, arguments = parse(argv)
        request = next(iter(requests.values()))
        run, chain = plan(requests, arguments)
        check(chain)
        records = Records(run)
        if request.dry_run:
            print(describe(chain, records) if request.executor == "slurm" else graph(chain))
            return 0
        if request.executor != "slurm":
            return here.run(chain, records)
        slurm.check_installed()
        with records.held():
            batch.submit(chain, records)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    typed = shlex.quote(str(run))
    print(f"run folder: {run}\nfollow: python -m jobs.status {typed}\ncancel: python -m jobs.cancel {typed}")
    print("resume: the same command again")
    return 0


def describe(chain: Chain, records: Records) -> str:
    """The dependency graph and the batch scripts, of complete stages too."""
    parts = [graph(chain)]
    for before, runs in zip([None, *chain], chain, strict=False):
        array = len(runs) > 1
        after = f"{'aftercorr' if array else 'afterok'}:<job of {before[0].path.name}>" if before else None
        parts.append(f"# {runs[0].path.name}\n{batch.script(runs, records, after)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
