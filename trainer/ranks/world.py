"""This process among the ranks: its device, the process group, the end. The first that imports DeepSpeed."""

import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data import cores
from trainer.ranks.cores import share
from trainer.ranks.errors import MachineError, explain
from trainer.ranks.launch import ON_CPU, check_port, read_ranks

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed builds its operators with this environment's ninja; the environment may not be activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
if os.access(sys.prefix, os.W_OK):
    # Beside the environment that builds them: two environments would overwrite each other's in ~/.cache.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

# The engine imports DeepSpeed's Muon, three decorated functions that nobody calls here: 2 s, in which torch loads its
# compiler to wrap them.
_compile, torch.compile = torch.compile, lambda function=None, **_: function or (lambda wrapped: wrapped)
try:
    import deepspeed.runtime.zero.muon.original_muon
finally:
    torch.compile = _compile

# The tests do cover our optimizer, torch's AdamW with an average; and a machine without a GPU is no reason to warn.
deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

DEVICES = Path("/dev")
DRIVERS = {"11": 450, "12": 525, "13": 580}  # CUDA's major version -> the oldest NVIDIA driver that runs it


@dataclass(frozen=True)
class World:
    """This process among the ranks, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def device_name(self) -> str:
        """Of this process's device, such as "NVIDIA H100 80GB HBM3"; "CPU" where there is no other."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"


def this_process() -> World:
    """Rank, number of ranks and device, as the launcher set them; rank 0 of 1 without a launcher.

    Raises:
        MachineError: the launcher's variables do not fit, the node has fewer GPUs than ranks, or the port is taken.
    """
    rank, local_rank, size = read_ranks()
    check_port(rank)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not ON_CPU:
        found = torch.cuda.device_count()
        bound = found == 1 and "SLURM_PROCID" in os.environ  # srun --gpus-per-task shows a rank its own GPU alone
        if local_rank >= found and not bound:
            what = f"rank {rank} is rank {local_rank} on {socket.gethostname()}, where torch sees {found} GPUs"
            raise MachineError(f"{what}; start at most one rank per GPU")
        device = torch.device("cuda", 0 if bound else local_rank)
    return World(rank, local_rank, size, device)


def check_driver() -> None:
    """Raises MachineError when the machine has GPUs that torch cannot use: it would train on the CPU unasked."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").lower() in ("", "-1", "none", "nodevfiles")
    if torch.cuda.is_available() or ON_CPU or hidden:
        return
    gpus = [path for path in DEVICES.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK)]
    if not gpus:
        return  # none, or Slurm gave this job none
    try:
        torch.cuda.init()
        reason = "it finds none of them"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].rstrip(".")
    cuda = torch.version.cuda
    needs = f"torch {torch.__version__} is built " + (f"for CUDA {cuda}" if cuda else "without CUDA")
    if driver := DRIVERS.get((cuda or "").partition(".")[0]):
        needs += f" and needs driver {driver} or newer"
    raise MachineError(
        f"{socket.gethostname()} has {len(gpus)} NVIDIA GPU{'s' if gpus[1:] else ''} that torch cannot use: {reason}; "
        f"{needs}; to train on the CPU set DS_ACCELERATOR=cpu"
    )


def building() -> str:
    """A line for whoever waits, where DeepSpeed has first to compile what CPU ranks talk through; else nothing."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder") if not torch.cuda.is_available() else None
    if builder is None or any(Path(os.environ.get("TORCH_EXTENSIONS_DIR", "")).glob(f"{builder.NAME}/*.so")):
        return ""
    return "DeepSpeed compiles its collective for CPU ranks, once: up to a minute\n"


def join(me: World) -> None:
    """Enter the process group: NCCL on GPUs, gloo on CPUs. Each rank takes its share of the cores.

    Raises:
        MachineError: another process has the port.
    """
    if me.size == 1 and "MASTER_ADDR" not in os.environ:  # plain python: a group of one, on a port of its own
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
        os.environ["LOCAL_RANK"] = str(me.device.index)  # DeepSpeed's device
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        deepspeed.init_distributed()
    except RuntimeError as error:
        if (line := explain(error)) is None:
            raise
        raise MachineError(line) from error
    place = socket.gethostname(), os.sched_getaffinity(0)
    everyone = [place] * me.size
    dist.all_gather_object(everyone, place)
    cores.tell(share(place, everyone))
    if me.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores.own())
    # Its collective on CPUs leaves a buffer of 66 MiB per rank in /dev/shm for ever. Once all ranks have mapped the
    # buffers, their names can go: the memory then lives as long as the processes, however they end.
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    buffer = Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{os.environ['RANK']}"
    buffer.unlink(missing_ok=True)


def leave() -> None:
    """Wait for all ranks before the process ends: when one ends with a status, the launcher kills the others."""
    dist.barrier()


def end(status: int) -> None:
    """End the process at once: the interpreter's own end takes seconds, in which a signal would change the status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
