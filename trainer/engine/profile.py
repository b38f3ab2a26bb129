"""`train.profile`: how long each part of a step takes, on one screen, and torch's trace of the same steps."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("data", "teacher", "student forward", "backward", "optimizer", "logging")  # in the table's order
COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel", "c10d::", "deepspeed::inference_all_reduce")
_running: "Profile | None" = None


class Mark:
    """A point in the work of a device: on a GPU it is set when the device comes there, and the host goes on."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is None:
            self.time = time.perf_counter()
        else:
            self.event.record(torch.cuda.current_stream(device))

    def seconds_to(self, later: "Mark") -> float:
        """Seconds between the two; the device must have passed both."""
        if self.event is None:
            return later.time - self.time
        return self.event.elapsed_time(later.event) / 1000


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """A part of a step, by a name of `PARTS`, for the profile that runs; without one it does nothing."""
    if _running is None:
        yield
        return
    with _running.part(name), record_function(name):
        yield


class Profile:
    """The profile of the steps `train.profile` on this rank. A part's time is without that of the parts within it."""

    def __init__(self, steps: str | None, folder: Path, device: torch.device) -> None:
        """`steps`: "FROM-TO", both of them included, counted from 1; None profiles nothing."""
        self.first, self.last = map(int, steps.split("-")) if steps else (0, -1)
        self.folder, self.device = folder, device
        self._profiler: profile | None = None
        self._open: list[str] = []
        self._parts: list[tuple[str, str | None, Mark, Mark]] = []  # name, the part around it, begin, end

    def before(self, step: int) -> str | None:
        """To be called before each step, counted from 1, and with the number after the last one at the end.

        Returns:
            The table, when the last step to profile has been made.
        """
        if self._profiler is not None and not self.first <= step <= self.last:
            return self.stop(step - 1)
        if self._profiler is None and self.first <= step <= self.last:
            self._start(step)
        return None

    def _start(self, step: int) -> None:
        global _running
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # on a CPU it says that it finds no GPU
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self._profiler, self.first, _running = profile(activities=activities), step, self
        self._profiler.start()
        self._began = Mark(self.device)

    def stop(self, last: int) -> str | None:
        """End a profile that runs, whose last step is `last`, and write its files; returns the table."""
        global _running
        if self._profiler is None:
            return None
        profiler, self._profiler, _running = self._profiler, None, None
        ended = Mark(self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self.first}-{last}"
        profiler.export_chrome_trace(str(self.folder / f"{name}.json"))
        text = self._table(profiler, self._began.seconds_to(ended), last)
        (self.folder / f"{name}.txt").write_text(text + "\n")
        return text

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """See the function `part`."""
        around = self._open[-1] if self._open else None
        self._open.append(name)
        began = Mark(self.device)
        try:
            yield
        finally:
            self._open.pop()
            self._parts.append((name, around, began, Mark(self.device)))

    def _table(self, profiler: profile, seconds: float, last: int) -> str:
        spent: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
        for name, around, began, ended in self._parts:
            spent[name] += began.seconds_to(ended)
            if around is not None:
                spent[around] -= began.seconds_to(ended)
        steps = max(1, last - self.first + 1)
        rows = [*((name, spent[name]) for name in PARTS), ("the rest", seconds - spent.total()), ("a step", seconds)]
        rows.append(("communication, within the above", communication(profiler)))
        lines = [f"{name:<32}{1000 * time / steps:>10.2f} ms{time / seconds:>8.1%}" for name, time in rows]
        what = f"steps {self.first} to {last} on {self.device.type}, per step; the trace is {self.folder}"
        return "\n".join([what, *lines])


def communication(profiler: profile) -> float:
    """Seconds in collectives, as the device ran them; on a GPU they may run beside other work."""
    on_device, on_host = [], []
    for event in profiler.events():
        if not event.name.startswith(COLLECTIVES):
            continue
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        kind, microseconds = (on_device, event.device_time_total) if on_gpu else (on_host, event.cpu_time_total)
        kind.append((event.name, microseconds))
    if on_device:
        return sum(time for name, time in on_device if name.startswith("nccl") and ":" not in name) / 1e6
    # One collective is seen by several layers: the innermost, gloo's, has waited.
    inner = [time for name, time in on_host if name.startswith(("gloo:", "deepspeed::"))]
    return sum(inner or (time for _, time in on_host)) / 1e6
