"""This process among the ranks: its device, the process group, the end. The first that imports DeepSpeed."""

import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed builds its operators with ninja from the environment that runs, which need not be activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
if os.access(sys.prefix, os.W_OK):
    # Beside the environment that they are built from: two environments would build over each other in ~/.cache.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
from deepspeed import comm as dist

# Our optimizer is torch's AdamW with an average beside, which the tests do cover; and a machine need not have a GPU.
deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@dataclass(frozen=True)
class World:
    """This process among the ranks, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def this_process() -> World:
    """Rank, world size and device as the launcher set them in the environment; alone without a launcher."""
    rank, local_rank, size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(rank, local_rank, size, device)


def join(me: World) -> None:
    """Enter the process group: NCCL on GPUs, gloo on CPUs. On CPUs each rank takes its share of the cores."""
    if "RANK" not in os.environ:  # plain python: a group of one, on a port of its own
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    if me.device.type == "cuda":
        torch.cuda.set_device(me.device)
        torch.backends.cuda.matmul.allow_tf32 = True
    elif "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", me.size))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    deepspeed.init_distributed()
    # Its collective on CPUs leaves a buffer of 66 MiB a rank in /dev/shm for ever. Once all ranks have mapped them
    # their names can go: the memory then lives as long as the processes, however they end.
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    buffer = Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{os.environ['RANK']}"
    buffer.unlink(missing_ok=True)


def leave() -> None:
    """Wait for all ranks before the process ends: the launcher kills the others once one has ended with a status."""
    dist.barrier()


def end(status: int) -> None:
    """End the process. All is written: to take the interpreter apart takes seconds, in which signals count again."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
