"""A run folder that is another one on each node: found at the start, and before a checkpoint is published."""

import multiprocessing
import os
from pathlib import Path

import torch

from tests.support.zygote import free_port


def work(rank: int, port: int, folder: Path) -> None:
    from data import cores
    from trainer.engine.checkpoint import Checkpoints, _Writer
    from trainer.ranks import shared
    from trainer.ranks.world import join, this_process

    shared.VISIBLE = 1.0
    node = folder / f"node{rank}"
    (node / "run").mkdir(parents=True)
    (folder / "both/run").mkdir(parents=True, exist_ok=True)
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ours.items()} | {"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    join(this_process())
    (folder / f"cores{rank}").write_text(str(cores.own()))
    said = []
    for where in (folder / "both", node):
        os.chdir(where)
        checkpoints = Checkpoints(Path("run/checkpoints"), keep=1)
        checkpoints._writer = _Writer(Path("run/checkpoints/.writing-x"), {"a": torch.ones(4)}, {"step": 1})
        checkpoints._writer.start()
        for look in (lambda: shared.check_shared(Path("run")), checkpoints.publish):
            try:
                look()
                said.append("fine")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
    (folder / f"said{rank}").write_text("\n".join(said))


def test_ranks_that_see_different_folders(tmp_path: Path) -> None:
    port, fork = free_port(), multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(rank, port, tmp_path), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(tmp_path / f"cores{rank}").read_text() for rank in range(2)] == [share, share]
    said = (tmp_path / "said0").read_text().splitlines()
    assert (tmp_path / "said1").read_text().splitlines() == said
    host, remedy = os.uname().nodename, "give --run a folder on a file system that all nodes share"
    apart = f"is another folder on rank 0 ({host}) than on rank 1 ({host}); {remedy}"
    assert said[:2] == ["fine", "fine"]
    assert said[2] == f"MachineError: run: {apart}"
    assert said[3].startswith("UserError: run/checkpoints/step-00000001: the checkpoint cannot be written")
    assert apart in said[3]
    assert [path.name for path in tmp_path.glob("*/run/checkpoints/*")].count("step-00000001") == 1
    assert not list(tmp_path.glob("*/run/.shared*")) and not list(tmp_path.glob("node*/run/checkpoints/*"))
