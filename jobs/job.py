"""What runs on each rank of a job: the trainer, as under DeepSpeed's launcher."""

import os
import signal

import submitit

from jobs.records import Records
from trainer.config import UserError

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StageJob:
    """Runs `trainer/run.py` with `argv` on every rank; submitit pickles it."""

    def __init__(self, argv: list[str], gpus_per_node: int, records: Records) -> None:
        self.argv, self.gpus_per_node, self.records = argv, gpus_per_node, records

    def __call__(self) -> int:
        """The trainer's exit status. With the executors slurm and local the process ends with it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the imports take seconds; a stop takes effect afterwards
        here = submitit.JobEnvironment()
        if here.num_tasks > 1:
            torch_environment = submitit.helpers.TorchDistributedEnvironment()
            torch_environment.export(set_cuda_visible_devices=False, overwrite=True)
            if here.cluster == "local":
                os.environ["MASTER_ADDR"] = "127.0.0.1"  # the machine's name may have no address
            os.environ["LOCAL_SIZE"] = str(torch_environment.local_world_size)  # tells DeepSpeed of one node
        if here.global_rank == 0:
            self.records.note(here.job_id, "started", nodes=list(here.hostnames), ranks=here.num_tasks)
        from trainer.main import main
        from trainer.ranks.world import end

        status = self._check_gpus(here) or main(self.argv)
        if here.cluster == "slurm":  # the batch script notes the end, and requeues
            end(status)
        if here.global_rank == 0:
            self.records.note(here.job_id, "ended", status=status, why=None)
        if here.cluster == "local":
            end(status)
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Start again. submitit's own handler calls it, when a signal comes before the trainer listens."""
        return submitit.helpers.DelayedSubmission(self)

    def _check_gpus(self, here: submitit.JobEnvironment) -> int:
        import torch

        from trainer.ranks.watchdog import Watchdog

        found = torch.cuda.device_count()
        if here.local_rank < self.gpus_per_node and found < self.gpus_per_node:
            with Watchdog(here.global_rank, here.num_tasks) as watchdog:  # which ends the ranks on other nodes too
                what = f"--gpus_per_node {self.gpus_per_node}: torch sees {found} on {watchdog.host}"
                return watchdog.fail(UserError(f"{what}; ask for fewer, mend the driver there, or --exclude the node"))
        return 0
