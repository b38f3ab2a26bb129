"""Ranks as launchers say them, GPUs that torch cannot use, and what failures of the machine are called."""

import errno
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer.output import paths
from trainer.ranks import launch, world
from trainer.ranks.errors import MachineError, explain
from trainer.ranks.launch import check_port, first_host, read_ranks

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "localhost,node[2-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "1",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
}  # fmt: skip
ONE_NODE = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "nosuchhost.invalid", "SLURM_STEP_TASKS_PER_NODE": "5"}
MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MEETING}, (3, 1, 4)),
        (SLURM, (3, 1, 5)),
        (SLURM | ONE_NODE, (3, 1, 5)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 0, 1)),  # salloc, srun --pty
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 0, 1)),  # a batch script, without srun
        (SLURM | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **MEETING}, (0, 0, 2)),  # torchrun under srun
        (SLURM | MPI | MEETING, (5, 1, 8)),  # mpirun whose daemons srun started
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0", **MEETING}, (1, 0, 2)),
    ],
)
def test_ranks_are_what_the_launcher_says(environment: dict, ranks: tuple) -> None:
    environment = dict(environment)
    assert read_ranks(environment) == ranks
    assert read_ranks(environment) == ranks  # what was taken from Slurm is understood again


def test_ranks_of_srun_meet_on_the_first_node() -> None:
    several, one = dict(SLURM), SLURM | ONE_NODE
    read_ranks(several), read_ranks(one)
    assert (several["MASTER_ADDR"], one["MASTER_ADDR"]) == ("localhost", "127.0.0.1")
    assert several["MASTER_PORT"] == one["MASTER_PORT"] and 1024 < int(one["MASTER_PORT"]) < 32768
    assert (several["LOCAL_WORLD_SIZE"], several["LOCAL_SIZE"]) == ("2", "2")
    other = SLURM | {"SLURM_STEP_ID": "1"}
    read_ranks(other)
    assert other["MASTER_PORT"] != several["MASTER_PORT"]
    names = {"a": "a", "gpu[03-07,9]-ib,cpu1": "gpu03-ib", "r[1-2]n[04,6]": "r1n04", "node[2],x": "node2"}
    assert {nodes: first_host(nodes) for nodes in names} == names


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set, but RANK is"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x': must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 2: must be 0 to 1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK is -1: must be 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", **MEETING, "MASTER_PORT": "99999"},
            "MASTER_PORT is 99999: must be 1 to 65535",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING, "MASTER_ADDR": "no.invalid"}, "MASTER_ADDR is no.invalid"),
        (MPI, "mpirun started 8 processes, but MASTER_ADDR is not set"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", **MEETING}, "mpiexec started 2 processes, but MPI_LOCALRANKID is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 processes, but SLURM_PROCID is not set"),
    ],
)
def test_what_a_launcher_does_not_say_is_named(environment: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.0)
    with pytest.raises(MachineError, match=re.escape(words)):
        read_ranks(dict(environment))


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(MachineError, match=r"port \d+ on .*--master_port N"):
            check_port(0)
        check_port(1)  # rank 0 listens there
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        check_port(0)  # torchrun does


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPUs")
def test_gpus_that_torch_cannot_use_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "DEVICES", tmp_path)
    monkeypatch.setattr(world, "ON_CPU", False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    world.check_driver()  # a driver, and no GPU
    (tmp_path / "nvidia0").touch()
    with pytest.raises(MachineError, match=r"has 1 NVIDIA GPU that torch cannot use: .*; torch .*DS_ACCELERATOR=cpu"):
        world.check_driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    world.check_driver()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(world, "ON_CPU", True)
    world.check_driver()


def fails(what: str, folder: Path) -> None:
    """A failure of the machine, as real as a test may have it."""
    big = 2**60
    if what == "GPU":
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has a total capacity of 79.10 GiB of which 1 is"
        )
    if what == "torch":
        torch.empty(big)
    if what == "numpy":
        np.empty(big // 16)
    if what == "no such folder":
        (folder / "none/x").write_text("")
    if what == "files":
        import resource

        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))
        try:
            held = [open(folder / str(i), "w") for i in range(100)]  # noqa: SIM115
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        del held
    if what == "full":
        with open("/dev/full", "w") as file:
            file.write("x" * 10**6)
    if what == "safetensors":
        save_file({"a": torch.zeros(4)}, folder / "none/x")
    if what == "port":
        with socket.create_server(("127.0.0.1", 0)) as taken:
            torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True, wait_for_workers=False)
    if what == "wrapped":
        try:
            fails("GPU", folder)
        except RuntimeError as error:
            raise KeyError("a wrapper") from error
    if what == "a bug":
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "GPU": r"the GPU is out of memory \(it asked for 20.00 GiB of 79.10 GiB on GPU 3\); lower train.micro_batch",
        "wrapped": "the GPU is out of memory",
        "torch": "the machine is out of memory.*lower data.workers",
        "numpy": "the machine is out of memory.*lower data.workers",
        "files": "too many open files; raise .* ulimit -n",
        "full": "FOLDER: no space left on device; make room",
        "safetensors": "FOLDER: no such file or directory",  # it says the number alone
        "no such folder": "FOLDER/none/x: no such file or directory",
        "port": "another process has the port of the ranks .*--master_port",
        "a bug": None,
    }.items(),
)
def test_failures_of_the_machine_are_one_line(tmp_path: Path, what: str, words: str | None) -> None:
    with pytest.raises((OSError, RuntimeError, MemoryError, KeyError, SafetensorError)) as caught:
        fails(what, tmp_path)
    line = explain(caught.value, tmp_path)
    if words is None:
        assert line is None
    else:
        assert re.search(words.replace("FOLDER", re.escape(str(tmp_path))), line) and "\n" not in line, line


@pytest.mark.parametrize("number", (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL))
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(paths.fcntl, "flock", flock)
    paths.hold(tmp_path, 0).close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}: its file system has no locks (")
    monkeypatch.setattr(paths.fcntl, "flock", lambda *_: exec("raise OSError(5, 'Input/output error')"))
    with pytest.raises(OSError, match="Input/output"):
        paths.hold(tmp_path, 0)
