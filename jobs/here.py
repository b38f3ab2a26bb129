"""The executors local and debug: stages on this machine, one after another."""

import signal
import time

import submitit

from jobs.plan import Chain, Planned
from jobs.records import Records, Submitted
from jobs.report import last_error
from trainer.output.paths import is_complete


def run(chain: Chain, records: Records) -> int:
    """Run what is not complete, and print it. Returns the exit status of the first stage that fails, or 0.

    Ctrl-C stops the stage that runs, which saves.
    """
    records.folder.mkdir(parents=True, exist_ok=True)
    for runs in chain:
        for planned in runs:
            if is_complete(planned.path):
                print(f"{planned.name}: is complete", flush=True)
            elif status := _run(planned, records):
                return status
    return 0


def _run(planned: Planned, records: Records) -> int:
    request = planned.request
    debug = request.executor == "debug"
    before = signal.getsignal(signal.SIGINT)
    if debug:
        job = submitit.DebugExecutor(records.folder).submit(planned.job(records))
    else:
        executor = submitit.LocalExecutor(records.folder)
        executor.update_parameters(
            timeout_min=request.minutes, signal_delay_s=request.signal_delay, gpus_per_node=request.gpus_per_node,
            tasks_per_node=request.ranks, setup=request.setup, stderr_to_stdout=True,
        )  # fmt: skip
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # submitit's controller leaves Ctrl-C to the ranks, too
        job = executor.submit(planned.job(records))
    try:
        records.add(Submitted(job.job_id, str(planned.run), planned.stage, request.executor, None, time.time()))
        print(f"{planned.name}: job {job.job_id}{'' if debug else f', {records.log(job.job_id)}'}", flush=True)
        job.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    ends = [event["status"] for event in records.journal(job.job_id) if event["event"] == "ended"]
    status = ends[-1] if ends else 1  # a rank that died ends all, without an event in the journal
    said = "" if debug else last_error(records.log(job.job_id)) or ""
    print(f"{planned.name}: {'done' if status == 0 else f'ended with status {status}. {said}'}", flush=True)
    return status
