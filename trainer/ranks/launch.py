"""Rank and world size as the launcher says them: DeepSpeed, torchrun, srun or mpirun. Imports nothing heavy."""

import os
import re
import socket
import time
from collections.abc import MutableMapping

from trainer.ranks.errors import PORT, MachineError

# Launchers that do not set RANK: their names for number of ranks, rank, and rank on its node.
LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
}
ON_CPU = os.environ.get("DS_ACCELERATOR") == "cpu"  # asked for; imports set it later, where torch sees no GPU
PATIENCE = 15.0  # seconds in which the name of rank 0's machine must lead to an address


def read_ranks(environment: MutableMapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Rank, rank on this node, and number of ranks. A process without a launcher is rank 0 of 1.

    What srun or mpirun say is written to RANK, LOCAL_RANK, WORLD_SIZE and so on, where torch and DeepSpeed read it.

    Raises:
        MachineError: the launcher's variables do not fit each other, or are not enough.
    """
    if "RANK" not in environment:
        _take(environment)
    if "RANK" not in environment:
        if _number(environment, "WORLD_SIZE", 1) > 1:
            raise MachineError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']}, but RANK is not set; start the ranks with deepspeed, "
                "torchrun or srun, or unset it"
            )
        return 0, 0, 1
    size = _number(environment, "WORLD_SIZE", None)
    rank = _number(environment, "RANK", None)
    local_rank = _number(environment, "LOCAL_RANK", 0 if size == 1 else None)
    if not 0 <= rank < size:
        raise MachineError(f"RANK is {rank}: must be 0 to {size - 1}, since WORLD_SIZE is {size}")
    if not 0 <= local_rank <= rank:
        raise MachineError(f"LOCAL_RANK is {local_rank}: must be 0 to {rank}, since RANK is {rank}")
    if size > 1 or "MASTER_ADDR" in environment:
        _check_address(environment)
    return rank, local_rank, size


def _take(environment: MutableMapping[str, str]) -> None:
    """Write what srun or mpirun say under torch's names; nothing when they started one process."""
    # With the most ranks: mpirun may start its daemons through srun, one per node.
    launcher = max(LAUNCHERS, key=lambda name: _number(environment, LAUNCHERS[name][0], 1))
    size, rank, local_rank = LAUNCHERS[launcher]
    if _number(environment, size, 1) == 1:
        return
    for needed in (rank, local_rank):
        if needed not in environment:
            count = environment[size]
            raise MachineError(f"{launcher} started {count} processes, but {needed} is not set; start the ranks with "
                               "deepspeed, torchrun or srun")  # fmt: skip
    address, port = _meeting_point(environment) if launcher == "srun" else (None, None)
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if value is not None:
            environment.setdefault(name, value)
        elif name not in environment:
            raise MachineError(f"{launcher} started {environment[size]} processes, but {name} is not set; give them "
                               "MASTER_ADDR, the host of rank 0, and MASTER_PORT (mpirun -x, -genv)")  # fmt: skip
    ranks_here = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") if launcher == "mpirun" else _tasks_here(environment)
    if ranks_here is not None:
        environment["LOCAL_WORLD_SIZE"] = environment["LOCAL_SIZE"] = ranks_here  # the latter is DeepSpeed's
    environment |= {"WORLD_SIZE": environment[size], "LOCAL_RANK": environment[local_rank]}
    environment["RANK"] = environment[rank]


def _meeting_point(environment: MutableMapping[str, str]) -> tuple[str | None, str]:
    """Address and port of rank 0 in a step of Slurm: its first node, and a port that another step hardly has."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    address = "127.0.0.1" if environment.get("SLURM_STEP_NUM_NODES") == "1" else first_host(nodes)
    job, step = (_number(environment, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return address, str(10000 + (job * 97 + step) % 20000)  # below the ports that the kernel hands out


def first_host(nodes: str) -> str | None:
    """ "gpu[03-07,9]-ib,cpu1" -> "gpu03-ib"; None when nothing is there."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", found[0]) if found else None


def _tasks_here(environment: MutableMapping[str, str]) -> str | None:
    """ "4(x2),3" is 4 ranks on nodes 0 and 1, 3 on node 2."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [count] * int(times or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else None


def _number(environment: MutableMapping[str, str], name: str, default: int | None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise MachineError(f"{name} is not set, but RANK is; start the ranks with deepspeed, torchrun or srun, or "
                           "unset RANK for one process")  # fmt: skip
    try:
        return int(value)
    except ValueError:
        raise MachineError(f"{name} is {value!r}: must be a whole number") from None


def _check_address(environment: MutableMapping[str, str]) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise MachineError(f"{name} is not set, but RANK is; start the ranks with deepspeed, torchrun or srun")
    address, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT", None)
    if not 0 < port < 65536:
        raise MachineError(f"MASTER_PORT is {port}: must be 1 to 65535")
    until = time.monotonic() + PATIENCE
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except OSError as error:  # a name server may be late
            if time.monotonic() >= until or getattr(error, "errno", None) != socket.EAI_AGAIN:
                what = (error.strerror or str(error)).lower()
                raise MachineError(f"MASTER_ADDR is {address}, which has no address here ({what}); give the name or "
                                   "the IP address of rank 0's machine") from None  # fmt: skip
        except UnicodeError:
            raise MachineError(f"MASTER_ADDR is {address!r}: must be the name of a host") from None
        time.sleep(1)


def check_port(rank: int) -> None:
    """Raises MachineError on rank 0 when another process has MASTER_PORT. To call before anything listens there."""
    if rank != 0 or "MASTER_PORT" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # torchrun itself listens there
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does; a port that was left is free
        try:
            probe.bind(("", int(os.environ["MASTER_PORT"])))
        except OSError as error:
            port = f"port {os.environ['MASTER_PORT']} on {socket.gethostname()}"
            raise MachineError(f"{port}: cannot listen there ({error.strerror.lower()}); {PORT}") from None
