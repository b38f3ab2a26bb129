"""Stop on a signal: it sets a flag on the rank that receives it, and all ranks stop together."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from trainer.ranks.world import dist

STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, with everything saved; run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # Slurm sends the last, on request


class Stopped(Exception):
    """Some rank was asked to stop; raised on all ranks at the same point."""


class StopFlag:
    """Within its context `SIGNALS` only set a flag, however many come. So does the end of the launcher.

    If the caller blocked them before, a signal that came during the start counts here. A signal that is sent to the
    `deepspeed` command alone kills it and leaves its ranks behind: they save and end too.
    """

    def __init__(self) -> None:
        self.set = self._raises = False

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        launchers = _launchers()
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), name="launcher", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises Stopped, wherever the program is: where there are no steps to wait for."""
        self._raises = True
        try:
            if self.set:
                raise Stopped
            yield
        finally:
            self._raises = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.set = True
        if self._raises:
            self._raises = False  # once
            raise Stopped

    def _watch(self, launchers: list[psutil.Process]) -> None:
        while all(map(_lives, launchers)):
            time.sleep(1)
        self.set = True
        if self._raises:
            os.kill(os.getpid(), SIGNALS[0])

    def raise_if_set(self, device: torch.device) -> None:
        """Raises Stopped on all ranks when any was asked to stop; a collective."""
        if on_any_rank(self.set, device):
            raise Stopped

    def stoppable(self, batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
        """The same batches, as many on all ranks. A batch after any was asked to stop it raises Stopped on all."""
        on_any = OnAnyRank(device)
        for batch in batches:
            if on_any(self.set)[0]:
                raise Stopped
            yield batch


def on_any_rank(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on any rank; a collective."""
    flag = torch.tensor(float(condition), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


class OnAnyRank:
    """`on_any_rank` for a loop: it answers the question before, so that no host waits for its device.

    When the next question comes, the device has long added up the last one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._asked: tuple[Any, torch.Tensor] | None = None  # what is waited for, and where the answers will be

    def __call__(self, *conditions: bool) -> tuple[bool, ...]:
        """Ask which of `conditions` hold on any rank; a collective.

        Returns:
            The answers to the last call, as many; all False in the first one.
        """
        answers = (False,) * len(conditions) if self._asked is None else self._answers()
        flags = torch.zeros(len(conditions), device=self.device)
        for flag, condition in zip(flags, conditions, strict=True):
            flag.fill_(float(condition))  # a tensor made of numbers would be copied to the device, and waited for
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)
        if self._copies is None:
            self._asked = work, flags
            return answers
        with torch.cuda.stream(self._copies):
            work.wait()  # this stream does, not the host
            copied = flags.to("cpu", non_blocking=True)
            flags.record_stream(self._copies)
            self._asked = self._copies.record_event(), copied
        return answers

    def _answers(self) -> tuple[bool, ...]:
        done, flags = self._asked
        done.wait() if self._copies is None else done.synchronize()
        return tuple(map(bool, flags.tolist()))


def _launchers() -> list[psutil.Process]:
    """DeepSpeed's launcher on this machine, and the command `deepspeed` above it, if there are any."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents()[:3]:  # with --stage all below it
            command = process.cmdline()
            if "deepspeed.launcher.launch" in command or any(Path(word).name == "deepspeed" for word in command[:2]):
                found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
