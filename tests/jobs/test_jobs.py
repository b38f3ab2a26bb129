"""Jobs without a Slurm: what would be submitted, what is decided after a job, what status shows, and local jobs.

A real Slurm is in tests/suites/cluster.py.
"""

import json
import re
import shlex
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs import cancel, report, slurm, status
from jobs.after import STOPPED, decide, lost_nodes
from jobs.batch import _grouped
from jobs.plan import Planned, combinations, plan
from jobs.records import Records, Submitted
from jobs.settings import Request, parse
from jobs.submit import main
from tests.conftest import run_trainer
from trainer.config import UserError, explained
from trainer.config import parse as parse_settings
from trainer.output.folder import StageFolder
from trainer.ranks import signals
from trainer.setup.check import check

USR2 = 128 + 12


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submission without `trainer.setup.check`, which has tests of its own and takes 10 s to import."""
    monkeypatch.setattr("jobs.submit.check", lambda chain: None)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("30", 30), ("90:30", 91), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190), ("0-0:0:1", 1), ("1-1:1:1", 1502)],
)
def test_time_is_read_as_slurm_reads_it(time: str, minutes: int) -> None:
    assert Request(time=time).minutes == minutes


def test_a_clusters_file_is_overruled_by_its_stage_and_by_the_command_line(tmp_path: Path) -> None:
    cluster = {"partition": "gpu", "gpus_per_node": 8, "time": "10:00:00", "setup": ["module load cuda"],
               "slurm": {"reservation": "spring"}, "stages": {"probe": {"gpus_per_node": 1, "time": "30"}}}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(cluster, default_style=None).replace("'", ""))
    argv = ["--cluster", str(tmp_path / "mine.yaml"), "--stages", "probe", "2", "--train.lr", "-1", "--nodes", "2-4"]
    requests, arguments = parse([*argv, "--partition", "big", "--slurm.nice", "100", "--config", "cifar10"])
    assert list(requests) == ["2", "probe"]
    assert arguments == ["--train.lr", "-1", "--config", "cifar10"]
    two, probe = requests.values()
    assert (two.partition, two.gpus_per_node, two.ranks, two.minutes, two.nodes) == ("big", 8, 8, 600, "2-4")
    assert (probe.partition, probe.gpus_per_node, probe.minutes) == ("big", 1, 30)
    assert two.setup == ["module load cuda"] and two.slurm == {"reservation": "spring", "nice": 100}


def test_dry_run_prints_scripts_and_graph(
    unchecked: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm
    run = tmp_path / "mine"
    options = ["--nodes", "2", "--gpus_per_node", "8", "--cpus_per_gpu", "12", "--mem", "900G", "--account", "vision"]
    options += [
        "--setup",
        "module load cuda",
        "export A='b c'",
        "--slurm.reservation",
        "spring",
        "--slurm.exclusive=true",
    ]
    assert main(["--run", str(run), "--dry_run", *options]) == 0
    graph, *scripts = re.split(r"\n\n# (?:stage\d|probe)\n", capsys.readouterr().out)
    assert graph.splitlines()[0] == "mine/stage1: 2 nodes x 8 ranks, 1440 minutes"
    assert graph.splitlines()[3] == "mine/probe: 2 nodes x 8 ranks, 1440 minutes, after mine/stage3"
    wanted = ["nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "mem=900G", "account=vision"]
    wanted += ["reservation=spring", "exclusive", "requeue", "signal=USR2@120", "time=1440"]
    for script, before in zip(scripts, (None, "stage1", "stage2", "stage3"), strict=True):
        lines = script.splitlines()
        assert not [option for option in wanted if f"#SBATCH --{option}" not in lines]
        assert lines.index("module load cuda") + 1 == lines.index("export A='b c'")
        assert (f"#SBATCH --dependency='afterok:<job of {before}>'" in lines) == (before is not None)
        assert ("#SBATCH --kill-on-invalid-dep=yes" in lines) == (before is not None)
        assert sum(line.startswith("srun ") for line in lines) == 1
        assert any(" -m jobs.after $? " in line for line in lines)
    assert not run.exists()


def test_a_sweep_is_an_array(unchecked: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sweep = ["train.lr=1e-3,3e-4", "data.scale=[0.5,1],[1,1]"]
    assert combinations(sweep)["train.lr=3e-4,data.scale=_0.5,1_"] == ["--train.lr=3e-4", "--data.scale=[0.5,1]"]
    assert main(["--run", str(tmp_path / "s"), "--dry_run", "--stages", "1", "2", "--sweep", *sweep]) == 0
    out = capsys.readouterr().out
    assert out.count("#SBATCH --array=0-3%4") == 2
    assert "#SBATCH --dependency='aftercorr:<job of stage1>'" in out


def test_the_parent_is_where_the_first_stage_of_a_chain_starts(tmp_path: Path) -> None:
    requests, arguments = parse(["--cluster", "local", "--run", str(tmp_path), "--stages", "2", "3"])
    for typed in (["--student.parent", "none"], ["--student.parent=none"]):
        _, ((second,), (third,)) = plan(requests, [*arguments, *typed])
        assert [parse_settings(job.argv).student.parent for job in (second, third)] == ["none", None]


@pytest.mark.parametrize(
    ("before", "dependencies"),
    [
        ((None, None), [None]),
        (("5_0", "5_1"), ["aftercorr:5"]),
        (("5_1", "5_0"), ["afterok:5_1", "afterok:5_0"]),  # some of the sweep's stages were complete, say
        (("5_0", None), ["afterok:5_0", None]),
        (("5", "6"), ["afterok:5", "afterok:6"]),
    ],
)
def test_what_a_sweeps_next_stage_waits_for(before: tuple, dependencies: list) -> None:
    runs = [Planned(Path(name), "2", [], Request()) for name in "ab"]
    grouped = _grouped(runs, {planned.run: job for planned, job in zip(runs, before, strict=True)})
    assert [after for _, after in grouped] == dependencies
    assert [planned for part, _ in grouped for planned in part] == runs


MISTAKES = {
    "--cluster nosuch": "no such cluster; give a YAML file or one of debug, local, slurm",
    "--cluster FILE": "FILE: gpus: no such setting; did you mean gpus_per_node?",
    "--nodes 0": "nodes 0: must be a number, or LEAST-MOST",
    "--nodes 4-2": "nodes 4-2: must be a number, or LEAST-MOST",
    "--time soon": "time soon: must be minutes, or DAYS-HOURS:MINUTES:SECONDS",
    "--gpus_per_node some": "gpus_per_node some: must be a whole number at least 0",
    "--gpus_per_node 8 --ranks_per_node 4": "8 GPUs per node need as many ranks",
    "--slurm.dependency afterok:1": "slurm.dependency: jobs.submit sets it",
    "--cluster TWICE": "TWICE, line 2: nodes stands twice",
    "--cluster slrum": "no such cluster; did you mean slurm?",
    "--node 2": "--node: no such setting; did you mean nodes?",
    "--gpus 2": "--gpus: no such setting; did you mean gpus_per_node?",
    "--parttion gpu": "--parttion: no such setting; did you mean partition?",
    "--ranks_per_node 0": "ranks_per_node 0: must be a whole number at least 1",
    "--max_timeouts -1": "max_timeouts -1: must be a whole number at least 0",
    "--stages 4": "must be a list (one of 1, 2, 3, probe, evaluate each)",
    "--stage 4": "stage",
    "--cluster local --nodes 2": "local runs on this machine alone",
    "--sweep train.lr": "must be SETTING=VALUE,VALUE",
    "--sweep train.lrr=1,2": "--train.lrr: no such setting; did you mean train.lr?",
    "--train.steps few": "train.steps few: must be",
    "--config nosuch": "no such recipe",
    "--run 50%j": "Slurm replaces % in the path of a log",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_one_line(unchecked: None, tmp_path: Path, capsys: pytest.CaptureFixture, options: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gpus: 8\n")
    twice = tmp_path / "twice.yaml"
    twice.write_text("nodes: 1\nnodes: 2\n")
    names = {"FILE": str(file), "TWICE": str(twice)}
    argv = [names.get(word, word) for word in options.split()]
    words = re.sub("FILE|TWICE", lambda found: names[found[0]], MISTAKES[options])
    assert main(["--run", str(tmp_path / "run"), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "run").exists()


def test_without_slurm_on_the_path(
    unchecked: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: Slurm: no sbatch, srun and scontrol on the path")


FAILS_ON_A_NODE = {
    "--data.train nosuch.beton": "nosuch.beton",
    "--teacher.weights nosuch.pth": "nosuch.pth",
    "--teacher.name resnet18": "'resnet18'",
    "--data.image_size 33": "not a multiple of the patch size",
    "--student.keep_softmax [7]": "the model has blocks 0 to 1",
    "--deepspeed nosuch.json": "--deepspeed nosuch.json",
    "--train.batch_size 18": "must be a multiple of 4 ranks",
    "--student.parent nosuch": "nosuch",
}


@pytest.mark.parametrize("options", FAILS_ON_A_NODE)
def test_what_would_fail_on_a_node_is_found_before(small: Path, tmp_path: Path, options: str) -> None:
    common = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path / "run")]
    check(parse_settings(common), [1, 2, 4])
    kwargs = ["--teacher.kwargs", "{}"] if "resnet" in options else []
    with pytest.raises((UserError, ValueError, OSError), match=re.escape(FAILS_ON_A_NODE[options])):
        check(parse_settings([*common, *kwargs, *options.split()]), [1, 2, 4])


RUNNING = {"JobState": "RUNNING", "PreemptTime": "None", "RunTime": "00:10:00", "TimeLimit": "1-00:00:00"}
ENDING = {"JobState": "COMPLETING", "Reason": "None"}  # cancelled, say
LATE = RUNNING | {"RunTime": "23:58:00"}


@pytest.mark.parametrize(
    ("status", "job", "timeouts", "decided"),
    [
        (0, RUNNING, 0, (False, None)),
        (STOPPED, RUNNING, 9, (True, "stopped by a signal")),
        (STOPPED, LATE | {"JobState": "SIGNALING"}, 0, (True, "timed out")),
        (STOPPED, RUNNING | {"PreemptTime": "2026-01-01T00:00:00"}, 9, (True, "preempted")),
        (STOPPED, LATE | {"PreemptTime": "2026-01-01T00:00:00"}, 9, (True, "preempted")),
        (STOPPED, LATE, 1, (True, "timed out")),
        (STOPPED, LATE, 2, (False, "timed out 3 times; give it more --time or --max_timeouts, and submit it again")),
        (STOPPED, RUNNING | {"TimeLimit": "UNLIMITED"}, 0, (True, "stopped by a signal")),
        (USR2, RUNNING, 0, (True, "stopped by a signal")),
        (STOPPED, LATE | ENDING | {"Reason": "TimeLimit"}, 0, (True, "timed out")),
        (0, LATE | ENDING | {"Reason": "TimeLimit"}, 0, (True, "timed out")),  # where it was done, it finds that out
        (2, LATE | ENDING | {"Reason": "TimeLimit"}, 0, (False, None)),
        (STOPPED, RUNNING | ENDING, 0, (False, None)),
        (1, RUNNING, 0, (False, None)),
        (2, RUNNING, 0, (False, None)),
        (137, RUNNING, 0, (False, None)),
    ],
)
def test_what_is_requeued(
    status: int, job: dict, timeouts: int, decided: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "nodes", lambda names: {})
    assert decide(status, job, timeouts, max_timeouts=2, signal_delay=60) == decided


def test_the_status_is_the_trainers() -> None:
    assert STOPPED == signals.STOPPED


def test_a_lost_node_is_one_that_does_not_answer_where_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        up, down = listening.getsockname(), closed.getsockname()
        assert lost_nodes({"a": up, "b": down}) == ["b"]
        assert lost_nodes({"a": up, "b": up}) == []
        assert lost_nodes({"a": down, "b": down}) == []  # it is the asking that fails
        monkeypatch.setattr(slurm, "nodes", lambda names: {"a": up, "b": down})
        assert decide(1, RUNNING, 0, max_timeouts=2, signal_delay=60) == (True, "lost b")  # seen before Slurm does


def test_a_requeued_job_waits_for_what_is_left_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse_settings(["--stage", "1", "--run", str(tmp_path)])
    before, again = StageFolder(settings), StageFolder(settings)
    before.claim(settings, 0)
    with pytest.raises(UserError, match="another process is running this stage"):
        again.claim(settings, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(0.5, before._lock.close).start()  # its node is gone at last
    again.claim(settings, 0)


def stage(run: Path, name: str, *lines: dict, complete: bool = False) -> None:
    (run / name).mkdir(parents=True)
    config = {"train": {"steps": None, "epochs": 2.0, "batch_size": 10}}
    (run / name / "config.yaml").write_text(yaml.safe_dump(config))
    (run / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if complete:
        (run / name / "export").mkdir()
        (run / name / "export/config.json").write_text("{}")


def test_status_of_a_chain_that_failed_without_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # Slurm knows nothing of it any more
    run = tmp_path / "mine"
    records = Records(run)
    with records.held():
        for job, name, after in (("7", "1", None), ("8", "2", "7"), ("9", "3", "8"), ("10", "probe", "9")):
            records.add(Submitted(job, str(run), name, "slurm", after, time.time()))
    line = {"step": 50, "epoch": 0.5, "split": "train", "loss": 0.123456, "images_per_second": 20.0}
    stage(run, "stage1", line | {"step": 200, "epoch": 2.0}, complete=True)
    stage(run, "stage2", line, {"step": 50, "epoch": 0.5, "split": "val", "loss": 9.0})
    records.note("7", "started", nodes=["a"], ranks=1)
    records.note("7", "ended", status=0, why=None)
    records.note("8", "started", nodes=["a"], ranks=1)
    records.note("8", "requeued", status=75, why="preempted")
    for nodes in (["a"], ["b"]):
        records.note("8", "started", nodes=nodes, ranks=1)
    records.note("8", "ended", status=2, why=None)
    records.log("8").write_text("fine\nerror: no space left\nsrun: error: node: task 0: Exited with exit code 2\n")
    assert report.progress(run / "stage2") == (50, 200, 75.0, 0.123456)
    assert status.main([str(run)]) == 0
    header, *table = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "job", "state", "step", "restarts", "loss", "log", "error"]
    cells = [re.split(r"\s{2,}", line) for line in table]
    assert cells[0] == ["mine/stage1", "7", "COMPLETED", "200/200", "0", "0.1235"]
    log = str(records.log("8"))
    assert cells[1][:6] == ["mine/stage2", "8", "FAILED (status 2)", "50/200", "2 (preempted, by Slurm)", "0.1235"]
    assert cells[1][6:] == [log, "error: no space left"]
    assert cells[2] == ["mine/stage3", "9", "CANCELLED (job 8, which it waited for, did not succeed)", "0"]
    assert cells[3] == ["mine/probe", "10", "CANCELLED (job 9, which it waited for, did not succeed)", "0"]
    assert cancel.main([str(run)]) == 0
    assert "no job to cancel" in capsys.readouterr().out
    assert status.main([str(tmp_path / "other")]) == 2
    assert "no job was submitted for it" in capsys.readouterr().err


def test_a_job_that_left_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "show", lambda job: {"JobState": "FAILED"})
    submitted = Submitted("7", str(tmp_path), "1", "slurm", None, time.time())
    assert report.state_of(submitted, Records(tmp_path), {}) == ("FAILED", "")
    _, why = report.state_of(replace(submitted, time=time.time() - 100), Records(tmp_path), {})
    assert "is it on a file system that all nodes share?" in why


def test_debug_runs_in_the_process_that_submits(small: Path, tmp_path: Path) -> None:
    done = run_trainer(small, tmp_path / "run", 1, "--cluster", "debug", "--train.steps", "2")
    assert done.code == 0, done.err
    assert "run/stage1: done" in done.out and [line["step"] for line in done.lines("train")] == [1, 2]


def test_local_runs_ranks_as_jobs(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture, unchecked: None) -> None:
    run = tmp_path / "run"
    argv = ["--config", str(small / "recipe.yaml"), "--run", str(run), "--cluster", "local", "--ranks_per_node", "2"]
    assert main([*argv, "--stages", "1", "--train.steps", "2"]) == 0, capsys.readouterr()
    (job,) = Records(run).newest().values()
    assert [event["event"] for event in Records(run).journal(job.job)] == ["started", "ended"]
    assert Records(run).journal(job.job)[0]["ranks"] == 2
    capsys.readouterr()
    assert main([*argv, "--stages", "1", "--train.steps", "2"]) == 0
    assert capsys.readouterr().out == "run/stage1: is complete\n"
    assert status.main([str(run)]) == 0
    assert re.search(rf"run/stage1 +{job.job} +COMPLETED +2/2 ", capsys.readouterr().out)


def test_a_run_folder_with_spaces_under_home(
    unchecked: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my cluster.yaml").write_text("partition: gpu\n")
    argv = ["--stages", "1", "--cluster", "~/my cluster.yaml", "--dry_run", "--setup", "cd 'my code'"]
    assert main(["--run", "~/my runs/it's one", *argv]) == 0
    script = capsys.readouterr().out.split("# stage1\n")[1]
    assert "#SBATCH --partition=gpu" in script.splitlines() and "~" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    (after,) = [line for line in lines if "jobs.after" in line]
    (output,) = [line for line in lines if line.startswith("#SBATCH --output=")]
    run = tmp_path / "my runs/it's one"
    assert str(run) in shlex.split(after)
    assert shlex.split(output.removeprefix("#SBATCH ")) == [f"--output={run}/jobs/%j_0_log.out"]
    records = Records(run)
    with records.held():
        records.add(Submitted("7", str(run), "1", "local", None, time.time()))
    monkeypatch.chdir(tmp_path)
    for typed in ("~/my runs/it's one", "my runs/it's one", str(run)):
        assert status.main([typed]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith("it's one/stage1  7")
        assert cancel.main([typed]) == 0
        assert "no job to cancel" in capsys.readouterr().out


@pytest.mark.parametrize("command", (status, cancel))
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "the following arguments are required: RUN; usage: python -m jobs."),
        ("--run mine", "unrecognized arguments: --run"),
        ("minne", "no job was submitted for it; did you mean "),
    ],
)
def test_mistakes_of_status_and_cancel_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, command, argv: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    records = Records(tmp_path / "mine")
    with records.held():
        records.add(Submitted("7", str(tmp_path / "mine"), "1", "slurm", None, time.time()))
    assert command.main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_help_explains_every_option(capsys: pytest.CaptureFixture) -> None:
    assert all(text.endswith(".") for _, text in explained(Request)), dict(explained(Request))
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "GPUs per node, with one rank each" in " ".join(capsys.readouterr().out.split())
