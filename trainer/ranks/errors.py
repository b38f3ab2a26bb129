"""What a failure of the machine means: one line with its remedy. Imports nothing heavy."""

import errno
import os
import re
from pathlib import Path


class MachineError(OSError):
    """The machine, or how the ranks were launched, does not fit; one line that says how to mend it."""


_AGAIN = "then run the same command again"
_GPU_MEMORY = (
    "lower train.micro_batch_size or probe.batch_size, set train.grad_checkpointing true, or divide the optimizer's "
    "state among more GPUs with --deepspeed ds_configs/zero3.json"
)
_HOST_MEMORY = "lower data.workers or train.micro_batch_size, start fewer ranks per node, or ask for more memory"
_NUMBERS = {
    errno.ENOSPC: f"make room, {_AGAIN}",
    errno.EDQUOT: f"make room, {_AGAIN}",
    errno.EROFS: "use a path on a file system that can be written",
    errno.EACCES: "change its permissions, or use another path",
    errno.EPERM: "change its permissions, or use another path",
    errno.EMFILE: "raise the limit of open files per process, ulimit -n 65536",
    errno.ENFILE: "raise the machine's limit of open files, sysctl fs.file-max",
    errno.ENOMEM: _HOST_MEMORY,
    errno.EIO: f"look at the disk or the file server, {_AGAIN}",
    errno.ESTALE: f"look at the file server, {_AGAIN}",
}
PORT = "choose another port: deepspeed --master_port N, torchrun --master_port N, or MASTER_PORT=N in the environment"
# What torch, DeepSpeed and CUDA say -> what it means, and the remedy.
_MESSAGES = {
    r"CUDA out of memory|CUDA error: out of memory|STATUS_ALLOC_FAILED": ("the GPU is out of memory", _GPU_MEMORY),
    r"shared memory|torch_shm_manager|/dev/shm": (
        "/dev/shm, the memory that the ranks share, is full", "make it larger, docker run --shm-size 16g",
    ),
    r"DefaultCPUAllocator|DataLoader worker .*killed": ("the machine is out of memory", _HOST_MEMORY),
    r"EADDRINUSE|[Aa]ddress already in use": ("another process has the port of the ranks", PORT),
    r"Duplicate GPU detected": ("two ranks have the same GPU", "start at most one rank per GPU"),
    r"no kernel image is available": (
        "torch has no code for this GPU", "install a build of torch that names its compute capability",
    ),
    r"devices? (is|\(s\) is/are|are) busy or unavailable": (
        "another process holds the GPU", "wait for it, or choose another with CUDA_VISIBLE_DEVICES",
    ),
}  # fmt: skip


def explain(error: BaseException, folder: Path | None = None) -> str | None:
    """One line on what a failure of the machine means and how to mend it; None for any other error.

    Args:
        folder: where the program writes, for an error that names no file.
    """
    if number_of(error) is not None:
        where = getattr(error, "filename", None) or folder
        return f"{where}: {cause(error)}" if where is not None else cause(error)
    said = " ".join(str(error).split())
    if isinstance(error, OSError):
        return said  # a line of its own, with no number
    if isinstance(error, MemoryError):
        return f"the machine is out of memory{f' ({said})' if said else ''}; {_HOST_MEMORY}"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, RuntimeError):
        for pattern, (meaning, remedy) in _MESSAGES.items():
            if re.search(pattern, said):
                port = re.search(r"port: (\d+)", said)
                size = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", said)
                on = re.search(r"GPU (\d+) has a total capacity of ([\d.]+ \w+)", said)
                detail = " of ".join(part for part in (size and size[1], on and f"{on[2]} on GPU {on[1]}") if part)
                detail = f" (it asked for {detail})" if detail else f" ({port[1]})" if port else ""
                return f"{meaning}{detail}; {remedy}"
    return explain(error.__cause__, folder) if error.__cause__ is not None else None


def cause(error: BaseException) -> str:
    """ "no space left on device; make room, ...": why a file could not be read or written, and the remedy."""
    number = number_of(error)
    if number is None:
        return explain(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
    remedy = _NUMBERS.get(number)
    return f"{os.strerror(number).lower()}; {remedy}" if remedy else os.strerror(number).lower()


def number_of(error: BaseException) -> int | None:
    """The `errno` of an OSError, or the one that safetensors writes into its message; else None."""
    if isinstance(error, OSError):
        return error.errno
    written = re.search(r"\(os error (\d+)\)", str(error))
    return int(written[1]) if written else None
