"""`make bench`: one table, whatever becomes of a benchmark; and `make bench-gpu` runs without a GPU."""

import os
import time
from pathlib import Path

import pytest

from benchmarks import all as bench
from benchmarks import gpu
from benchmarks.all import BENCHMARKS, Benchmark, NotMeasuredError, cells, measured
from benchmarks.common import claim


def test_a_table_of_what_ran_and_of_what_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "start", Benchmark([], 60, ["-c", "raise SystemExit('no such file: a|b')"]))
    monkeypatch.setitem(BENCHMARKS, "probe", Benchmark([], 60, ["-c", "print('done')"]))
    status = bench.main(["--tiny", "--only", "start", "resolution", "probe", "--out", str(tmp_path / "runs/bench.md")])
    table = [line.strip("| ").split(" | ") for line in (tmp_path / "runs/bench.md").read_text().splitlines()[2:]]
    assert status == 1 and table[0] == ["claim", "ours", "peer", "ratio", "target", "met"]
    failed, *rows, silent = table[2:]
    assert failed[0] == "start: ended with status 1: no such file: a/b" and failed[-1] == "NOT MEASURED"
    assert silent[0] == "probe: printed no JSON"
    assert [row[0] for row in rows] == [
        f"test_vit, 32 pixels, {which}: linear over softmax" for which in ("forward", "forward and backward")
    ]
    for row in rows:
        ours, peer = (float(cell.removesuffix(" images/s")) for cell in row[1:3])
        assert abs(float(row[3]) - ours / peer) < 2e-3 * ours / peer and row[5] == "no target"


def test_one_that_takes_too_long_ends_with_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    work = "import subprocess, sys; subprocess.run(['sh', '-c', f'echo $$ > {sys.argv[1]}; exec sleep 600'])"
    with pytest.raises(NotMeasuredError, match=r"took more than 4 s"):
        measured(Benchmark(["-c", work, str(pid)], 20), patience=0.2)
    for _ in range(100):
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)  # until its new parent has waited for it
    state = Path(f"/proc/{int(pid.read_text())}/stat").read_text().rsplit(")", 1)[1].split()[0]
    assert state == "Z"


def test_targets_are_floors_or_ceilings_of_a_ratio_or_of_a_figure() -> None:
    for row, wanted in (
        (claim("a", 3.0, 2.0, "s", peer=2.0), ["a", "3 s", "2 s", "1.500", "at most 2", "yes"]),
        (claim("a", 3.0, 2.0, "/s", peer=2.0, at_least=True), ["a", "3 /s", "2 /s", "1.500", "at least 2", "NO"]),
        (claim("a", 3.0, 2.0, "s"), ["a", "3 s", "", "", "at most 2", "NO"]),
        (claim("a", 3.0, None), ["a", "3", "", "", "", "no target"]),
        (claim("a", 0, 0, "bytes"), ["a", "0 bytes", "", "", "at most 0", "yes"]),
    ):
        assert cells(row) == wanted
    said = {"forward-both-FOCUSED-6-64-90": {"spills": 0}, "forward-first-FOCUSED-6-64-90": {"spills": 8}}
    (row,) = bench.spills(said)
    assert (
        row["claim"] == "no spills on sm_90 at head dimension 64: FOCUSED-6, forward"
        and row["ours"] == 8
        and not row["met"]
    )


def test_limits_fit_in_twenty_minutes() -> None:
    assert sum(benchmark.limit for benchmark in BENCHMARKS.values()) <= 20 * 60


def test_bench_gpu_profiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--profile"])
    gpu.main()
    said = capsys.readouterr().out
    for words in ("softmax, 6 images of 32 pixels, forward: ", "linear, 6 images of 32 pixels, training: ", "aten::"):
        assert words in said


def test_bench_gpu_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--out", str(tmp_path / "runs/bench-gpu.md")])
    gpu.main()
    said = (tmp_path / "runs/bench-gpu.md").read_text()
    for name in ("softmax, SDPA", *(f"{name}, t" for name in (*gpu.OPERATORS, "value_conv5"))):
        assert f"| {name}" in said
    assert sum(line.startswith("| test_vit | 32 | ") for line in said.splitlines()) == 3  # one image, 34 tokens, memory
