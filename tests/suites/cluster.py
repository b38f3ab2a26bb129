"""Jobs on a real Slurm: `make cluster-test`. Two nodes on this machine, a rank per node, the embedded default.

At the end it prints a table of what was done to the jobs and whether anything was lost.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs.records import Records
from jobs.slurm import seconds
from jobs.submit import main
from tests.conftest import ENVIRONMENT, ROOT, curve
from tests.support.slurm import Slurm, missing

COLUMNS = ("run", "submitted", "preempted", "timed out", "node lost", "resumed", "equal to undisturbed")
TABLE: list[tuple[str, ...]] = []
# Ranks add up gradients in another order.
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, Slurm(Path(folder)) as slurm:
        yield slurm
    widths = [max(map(len, column)) for column in zip(COLUMNS, *TABLE, strict=True)]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for row in ("", *(COLUMNS, *TABLE)):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default at small size."""
    recipe = yaml.safe_load((ROOT / "trainer/recipes/default.yaml").read_text())
    recipe["train"] |= {"batch_size": 16, "steps": 40, "bf16": False, "eval_first": False, "log_every": 1}
    recipe["tracking"] = []
    recipe["stages"] |= {"probe": {}}
    for stage, part in recipe["stages"].items():
        part.get("train", {}).pop("epochs", None)
        if stage != "probe":
            part["data"] = {"val": None, "workers": 1}
    recipe["stages"]["probe"]["probe"] = {"images": 200, "solver": "ridge", "modules": ["blocks.*.act", "norm"]}
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Run:
    """A run folder, and what one does to it."""

    def __init__(self, slurm: Slurm, path: Path) -> None:
        self.slurm, self.path, self.records = slurm, path, Records(path)

    def submit(self, recipe: Path, *options: str, program: tuple[str, ...] = ("-m", "jobs.submit")) -> str:
        """What the command prints; one rank per node, on one core."""
        common = ("--config", str(recipe), "--run", str(self.path), "--cluster", "slurm", "--cpus_per_gpu", "1")
        done = python(*program, *common, "--time", "30", "--signal_delay", "60", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> str:
        return python("-m", "jobs.status", str(self.path)).stdout

    def job(self, stage: str, run: str | None = None) -> str:
        return self.records.newest()[run or str(self.path), stage].job

    def events(self, stage: str, kind: str) -> list[dict]:
        return [event for event in self.records.journal(self.job(stage)) if event["event"] == kind]

    def steps(self, stage: str) -> int:
        path = self.path / f"stage{stage}/metrics.jsonl"
        return max([line["step"] for line in curve(path.parent)], default=0) if path.exists() else 0

    def wait(self, condition: Callable[[], bool], seconds: float = 400) -> None:
        """Until it holds. Jobs that were requeued wait for 5 s, not for two minutes as Slurm has them do.

        Where one starts in the second in which it ended, its node takes it for the one that ended and refuses it.
        """
        end = time.monotonic() + seconds
        seen: dict[str, float] = {}
        while not condition():
            for job in self.slurm.command("squeue", "-h", "-t", "PD", "-o", "%i %r").splitlines():
                name, reason = job.split(maxsplit=1)
                if reason == "BeginTime" and time.monotonic() - seen.setdefault(name, time.monotonic()) > 5:
                    self.slurm.command("scontrol", "update", f"jobid={name}", "StartTime=now")
            assert time.monotonic() < end, self.status() + self.slurm.command("squeue")
            time.sleep(0.5)

    def ended(self, *stages: str) -> bool:
        return all(self.events(stage, "ended") for stage in stages)

    def stand_still(self, stage: str, condition: Callable[[], bool]) -> None:
        """Stops the ranks in the middle of a stage, as soon as the condition holds.

        A fast machine is at the stage's end within a second of the first step: nothing slow may come in between.
        """
        self.wait(lambda: bool(self.events(stage, "started")))
        found = ranks(self.job(stage))
        while not condition():
            assert all(map(psutil.Process.is_running, found)), self.status()
            time.sleep(0.01)
        for rank in found:
            rank.suspend()
        assert found and not self.events(stage, "ended")

    def signalled(self, stage: str, cause: Callable[[], object]) -> None:
        """Does what makes Slurm signal a running stage. With the signal Slurm lets the rank go on."""
        self.stand_still(stage, lambda: self.steps(stage) >= 3)
        cause()
        self.wait(lambda: bool(self.events(stage, "requeued")), 200)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    env = ENVIRONMENT | {"SLURM_CONF": os.environ["SLURM_CONF"]} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def ranks(job: str) -> list[psutil.Process]:
    """The trainer's processes of a job."""
    found = []
    for process in psutil.process_iter():
        try:
            if "submitit.core._submit" in process.cmdline()[:4] and process.environ().get("SLURM_JOB_ID") == job:
                found += [process] if process.environ().get("SLURM_PROCID") else []
        except psutil.Error:
            continue
    return [process for process in found if not process.name().startswith("srun")]


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"stage{stage}/export/model.safetensors")


def row(run: Run, stages: tuple[str, ...], equal: str) -> None:
    whys = [event["why"] for stage in stages for event in run.events(stage, "requeued")]
    resumed = sum(max(0, len(run.events(stage, "started")) - 1) for stage in stages)
    nodes = [event["nodes"] for stage in stages for event in run.events(stage, "started")]
    lost = sum(len(now) < len(before) for before, now in itertools.pairwise(nodes))
    counts = (whys.count("preempted"), whys.count("timed out"), lost)
    TABLE.append((run.path.name, str(len(stages)), *map(str, counts), str(resumed), equal))


@pytest.fixture(scope="session")
def undisturbed(cluster: Slurm, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A chain on node1, in the queue."""
    run = Run(cluster, tmp_path_factory.mktemp("runs") / "undisturbed")
    said = run.submit(recipe, "--slurm.nodelist", "node1")
    assert [line.split(":")[1] for line in said.splitlines()[1:4]] == [
        f" job {run.job(stage)}, after {run.job(before)}" for before, stage in ("12", "23", ("3", "probe"))
    ]
    return run


def test_a_chain_that_is_preempted_and_times_out_ends_as_an_undisturbed_one(
    undisturbed: Run, cluster: Slurm, recipe: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path / "disturbed")
    run.submit(recipe, "--slurm.nodelist", "node2")
    jobs = [run.job(stage) for stage in ("1", "2", "3", "probe")]

    def submit_again_and_preempt() -> None:
        assert run.submit(recipe, "--slurm.nodelist", "node2").count("is in the queue already") == 4
        assert jobs == [run.job(stage) for stage in ("1", "2", "3", "probe")]
        urgent = ["-p", "urgent", "-w", "node2", "--exclusive", "-o", "/dev/null", "--wrap", "true"]
        cluster.command("sbatch", *urgent)

    run.signalled("1", submit_again_and_preempt)
    assert [event["why"] for event in run.events("1", "requeued")] == ["preempted"]

    def shorten() -> None:
        job = cluster.show("job", run.job("2"))
        cluster.command("scontrol", "update", f"jobid={job['JobId']}", f"TimeLimit={seconds(job['RunTime']) // 60 + 2}")

    run.signalled("2", shorten)
    cluster.command("scontrol", "update", f"jobid={run.job('2')}", "TimeLimit=30")
    assert [event["why"] for event in run.events("2", "requeued")] == ["timed out"]
    run.wait(lambda: run.ended("probe") and undisturbed.ended("probe"), 900)

    for stage in ("1", "2", "3"):
        ours, theirs = weights(run.path, stage), weights(undisturbed.path, stage)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert curve(run.path / f"stage{stage}") == curve(undisturbed.path / f"stage{stage}")
    table = [line.split() for line in run.status().splitlines()[1:]]
    assert [line[2] for line in table] == ["COMPLETED"] * 4
    assert run.submit(recipe).count("is complete") == 4
    assert jobs == [run.job(stage) for stage in ("1", "2", "3", "probe")]
    row(undisturbed, ("1", "2", "3", "probe"), "itself")
    row(run, ("1", "2", "3", "probe"), "bit for bit")


def test_a_job_goes_on_without_the_node_it_lost(undisturbed: Run, cluster: Slurm, recipe: Path, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "node_lost")
    one_stage = ("trainer/run.py", "--stage", "1")
    run.submit(recipe, "--nodes", "1-2", "--train.save_every", "4", program=one_stage)
    run.stand_still("1", (run.path / "stage1/checkpoints/latest").exists)
    assert [event["nodes"] for event in run.events("1", "started")] == [["node1", "node2"]]
    cluster.kill_node("node2")
    try:
        run.wait(lambda: run.ended("1"))
    finally:
        cluster.start_node("node2")
    assert [event["nodes"] for event in run.events("1", "started")] == [["node1", "node2"], ["node1"]]
    assert [event["why"] for event in run.events("1", "requeued")] == ["lost node2"]  # whoever saw it first
    assert re.search(r"from step [1-9]", run.records.log(run.job("1")).read_text())
    undisturbed.wait(lambda: undisturbed.ended("1"))
    ours, theirs = weights(run.path, "1"), weights(undisturbed.path, "1")
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert all(torch.allclose(ours[name], theirs[name], **ROUNDING) for name in ours), worst
    row(run, ("1",), f"within {worst:.0e}")


def test_a_stage_that_fails_cancels_those_after_it(cluster: Slurm, recipe: Path, tmp_path: Path) -> None:
    from data import resolve

    file = tmp_path / "train.beton"
    shutil.copy(resolve("digits", "train"), file)
    run = Run(cluster, tmp_path / "fails")
    run.submit(recipe, "--data.train", str(file), "--stages", "1", "2", "3", "--slurm.begin", "now+5")
    file.unlink()  # what could not be known before
    run.wait(lambda: run.ended("1") and not cluster.command("squeue", "-h"))
    assert [event["status"] for event in run.events("1", "ended")] == [2]
    table = run.status().splitlines()[1:]
    assert re.search(rf"FAILED .*error: .*{file.name}", table[0]), table
    for line, before in zip(table[1:], ("1", "2"), strict=True):
        assert f"CANCELLED (job {run.job(before)}, which it waited for, did not succeed)" in line, table
    assert not (run.path / "stage2").exists()
    row(run, ("1", "2", "3"), "fails, as it must")


def test_a_cancelled_run_is_saved_and_stays_cancelled(cluster: Slurm, recipe: Path, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "cancelled")
    run.submit(recipe, "--stages", "1", "2", "--train.steps", "100000")
    run.wait(lambda: run.steps("1") >= 3)
    done = python("-m", "jobs.cancel", str(run.path))
    assert f"cancelled: job {run.job('1')} (stage 1), job {run.job('2')} (stage 2)" in done.stdout
    run.wait(lambda: not cluster.command("squeue", "-h"), 60)
    assert [line.split()[2] for line in run.status().splitlines()[1:]] == ["CANCELLED"] * 2
    kept = [path.name for path in (run.path / "stage1/checkpoints").glob("step-*")]
    assert kept == [f"step-{run.steps('1'):08d}"]


def test_a_sweep_goes_as_arrays(cluster: Slurm, recipe: Path, tmp_path: Path) -> None:
    sweep = Run(cluster, tmp_path / "sweep")
    sweep.submit(recipe, "--stages", "1", "2", "--sweep", "train.lr=1e-3,2e-3", "--train.steps", "4")
    runs = [sweep.path / f"train.lr={lr}" for lr in ("1e-3", "2e-3")]
    jobs = [[sweep.job(stage, str(run)) for run in runs] for stage in "12"]
    assert [[job.partition("_")[2] for job in stage] for stage in jobs] == [["0", "1"]] * 2
    assert cluster.show("job", jobs[1][0])["Dependency"].startswith("aftercorr:")
    sweep.wait(lambda: all((run / "stage2/export/config.json").exists() for run in runs))
    sweep.wait(lambda: not cluster.command("squeue", "-h"), 60)
    assert sweep.status().count("COMPLETED") == 4
    assert json.loads((runs[1] / "stage2/metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_mistakes_are_named_in_slurms_words(
    cluster: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.submit.check", lambda chain: None)  # it would find some of them itself
    common = ("--run", str(tmp_path / "run"), "--stages", "1", "2", "--time", "30")
    mistakes = {
        ("--partition", "nosuch"): r"error: sbatch: .*invalid partition specified: nosuch.*",
        ("--gpus_per_node", "8"): r"error: sbatch: .*Requested node configuration is not available.*",
    }
    for options, words in mistakes.items():
        assert main([*common, *options]) == 2
        said = capsys.readouterr().err.strip()
        assert re.fullmatch(words, said), (options, said)
    assert not cluster.command("squeue", "-h")


def test_what_a_node_lacks_is_named(cluster: Slurm, recipe: Path, tmp_path: Path) -> None:
    gpus = Run(cluster, tmp_path / "gpus")
    gpus.submit(recipe, "--stages", "1", "--gpus_per_node", "2", "--slurm.nodelist", "node1")
    unshared = Run(cluster, cluster.unshared / "run")
    unshared.submit(recipe, "--stages", "1", "--slurm.nodelist", "node2")
    gpus.wait(lambda: gpus.ended("1") and not cluster.command("squeue", "-h"))
    assert "error: --gpus_per_node 2: torch sees 0 on" in gpus.status()
    assert "FAILED" in unshared.status()
    line = json.loads((unshared.records.folder / "submitted.jsonl").read_text())
    (unshared.records.folder / "submitted.jsonl").write_text(json.dumps(line | {"time": 0.0}) + "\n")  # long ago
    assert "left no trace" in unshared.status()


def test_plain_srun_starts_ranks_and_they_look_for_one_folder(cluster: Slurm, recipe: Path, tmp_path: Path) -> None:
    def srun(run: Path) -> subprocess.CompletedProcess:
        options = ["--config", str(recipe), "--stage", "1", "--run", str(run), "--train.steps", "2"]
        command = ["srun", "--nodes=2", "--ntasks=2", sys.executable, "trainer/run.py", *options]
        env = ENVIRONMENT | {"SLURM_CONF": os.environ["SLURM_CONF"]}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)

    done = srun(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in curve(tmp_path / "run/stage1")] == [1, 2]  # once, by one run of two ranks
    apart = srun(cluster.unshared / "srun")
    assert apart.returncode == 2 and "is another folder on rank 0 (" in apart.stderr, apart.stderr
    assert not list((cluster.unshared / "srun/stage1").glob("checkpoints/step-*"))
