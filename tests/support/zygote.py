"""Runs of trainer/run.py that start quickly: forked from a process that has imported everything once.

A fresh process spends most of its CPU time on imports (torch, DeepSpeed, FFCV, timm) and on compiling FFCV's decoders.
Here a zygote does both, keeps no thread and touches no device, and forks a child a rank: its own session, environment
and arguments, output to files, real signals and a real exit status. `Run` asks for them; as a script this file is the
zygote.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Zygote:
    """The process that forks, started with `env`. `beton`: a file whose like the children will decode."""

    def __init__(self, env: dict[str, str], beton: Path) -> None:
        self.env = env
        command = [sys.executable, str(Path(__file__)), str(beton)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        atexit.register(self.close)

    def ask(self, **request: Any) -> Any:
        """One request, one answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the zygote ended with {self.process.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        """Ends it; the kernel kills children that still run."""
        self.process.stdin.close()
        self.process.wait()


class Rank:
    """A forked process. `code` is its exit status as `subprocess` gives it (-9: killed), None while it runs."""

    def __init__(self, zygote: Zygote, **how: Any) -> None:
        self.zygote, self.code = zygote, None
        self.pid: int = zygote.ask(do="fork", **how)

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.zygote.ask(do="poll", pid=self.pid)
        return self.code

    def signal(self, number: int) -> None:
        """To its process group; nothing when it has ended. Until it is polled its id is given to no other."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # it has not made its group yet
                os.kill(self.pid, number)


class Run:
    """A run of trainer/run.py: a forked child a rank, started and ended as DeepSpeed's launcher does it.

    Args:
        argv: the program's arguments.
        log: a folder for `out` and `err`, which all ranks append to.
        env: changes to the zygote's environment. What a library reads when it is imported cannot be changed so.
        supervised: False leaves the other ranks alone when one ends, as srun may.
        of_rank: further arguments of single ranks.
    """

    def __init__(
        self, zygote: Zygote, argv: list[str], log: Path, ranks: int = 1, env: dict[str, str] | None = None,
        supervised: bool = True, of_rank: dict[int, list[str]] | None = None,
    ) -> None:  # fmt: skip
        self.log, self.code, self.supervised, self.ending_since = log, None, supervised, None
        common = zygote.env | (env or {})
        if ranks > 1:
            world = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "CROSS_RANK": 0, "CROSS_SIZE": 1}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            common |= {name: str(value) for name, value in world.items()}
        self.ranks = []
        for rank in range(ranks):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            given = [f"--local_rank={rank}", *argv] if ranks > 1 else argv
            given = [*given, *(of_rank or {}).get(rank, [])]
            self.ranks.append(Rank(zygote, argv=given, env=common | mine, out=str(log / "out"), err=str(log / "err")))

    def poll(self) -> int | None:
        """The exit status, None while a rank runs. One that fails ends the others: SIGTERM, 30 s later SIGKILL."""
        codes = [rank.poll() for rank in self.ranks]
        failed = [code for code in codes if code]
        if self.code is None and failed:
            self.code, self.ending_since = failed[0], time.monotonic()
            if self.supervised:
                self.signal(signal.SIGTERM)
        if None in codes:
            if self.supervised and self.ending_since is not None and time.monotonic() - self.ending_since > 30:
                self.signal(signal.SIGKILL)
            return None
        self.code = self.code or 0
        return self.code

    def wait(self, timeout: float) -> int:
        """The exit status. After `timeout` seconds all are killed, and TimeoutError says what they had printed."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"no end in {timeout} s\n{self.text('out')}\n{self.text('err')}")
            time.sleep(0.01)
        return code

    def signal(self, number: int) -> None:
        """To every rank."""
        for rank in self.ranks:
            rank.signal(number)

    def kill(self) -> None:
        """SIGKILL to every rank, and the end of each awaited."""
        while any(rank.poll() is None for rank in self.ranks):
            self.signal(signal.SIGKILL)
            time.sleep(0.002)
        self.poll()

    def text(self, name: str) -> str:
        """What was printed to `out` or `err`."""
        path = self.log / name
        return path.read_text(errors="replace") if path.exists() else ""


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve() -> None:
    """The zygote: returns in a child, with its arguments in place, and never in itself."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    before = dict(os.environ)
    import_everything()
    set_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
    end = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) > 1:  # the decoders' are on their way out
        assert time.monotonic() < end, "a thread would be missing in every child"
        time.sleep(0.01)
    os.register_at_fork(after_in_child=renew_thread_pool)  # `--stage all` forks again
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("do") == "fork":
            answer = os.fork()
            if answer == 0:
                answers.close()
                become(**request)
                os.environ.update(set_by_imports)
                return
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


def import_everything() -> None:
    """Imports what the program does, at once or late, and compiles its decoders, without leaving a thread behind."""
    import numba

    start_threads, numba.set_num_threads = numba.set_num_threads, lambda n: None
    import ffcv.pipeline.compiler

    ffcv.pipeline.compiler.set_num_threads = start_threads
    sys.path[0] = str(ROOT)
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  by the engine, late; it brings TorchInductor

    import data
    import trainer.main  # noqa: F401

    beton = sys.argv[1]
    for build in (data.train_loader, data.eval_loader):
        loader = build(beton, image_size=32, batch_size=1, workers=1)
        next(loader.epoch())
        loader.close()
    masked = Path(beton).with_name("masked.beton")
    if masked.exists():
        for loader in (
            data.train_loader(masked, image_size=32, batch_size=1, masks=True, workers=1),
            data.original_loader(masked, batch_size=1, workers=1),
        ):
            next(loader.epoch())
            loader.close()
    numba.set_num_threads = start_threads
    gc.freeze()  # the collector would touch, and so copy, every page in every child


def become(argv: list[str], env: dict[str, str], out: str, err: str) -> None:
    """A child takes on what it is started with. It is killed when the zygote ends."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["trainer/run.py", *argv]
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        opened = os.open(path, flags | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    if "RANK" in env:  # as the launcher starts it
        sys.stdout.reconfigure(write_through=True)


def renew_thread_pool() -> None:
    """Lets torch replace the thread pool whose threads the fork left behind, while one thread alone asks for it.

    torch does so at the first use after a fork, without a lock: of two threads the second may find no pool, and end the
    process ("Invalid thread pool!"; `caffe2::pthreadpool`).
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def run_program() -> None:
    """Run the program as `python` does. Ends the process without taking the interpreter apart: 2 s of copied pages."""
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        assert isinstance(code, int), code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
    run_program()
