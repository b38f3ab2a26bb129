"""Checkpoints on real ranks: any world size and ZeRO stage, what is kept, what is passed over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ENVIRONMENT, ROOT, curve, forget_after, run_trainer
from trainer.engine.checkpoint import ASIDE, MANIFEST, Files, _held_by_share, verify
from trainer.engine.shards import Run

# fp32; ranks add up gradients and losses in another order.
SAME = {"rel": 2e-4, "abs": 1e-6}
OPTIONS = {
    1: [],
    2: ["--stage2.loss", "cosine_smooth_l1"],
    3: ["--stage3.layer_decay", "0.7", "--stage3.ema", "0.9", "--stage3.mixup", "0.8", "--stage3.drop_path", "0.1"],
}
EVERY_STEP = ["--train.save_every", "1", "--train.keep", "9"]


def go(small: Path, run: Path, stage: int, zero: int = 1, ranks: int = 1, options: list[str] | None = None):
    """A stage on its own (from the teacher's weights), to its end."""
    config = str(ROOT / f"ds_configs/zero{zero}.json")
    options = [*OPTIONS[stage], "--student.parent", "none", "--deepspeed", config, *(options or EVERY_STEP)]
    done = run_trainer(small, run, stage, *options, ranks=ranks)
    assert done.code == 0, done.err
    return done


# (ranks, ZeRO stage) of the first two steps, of the next two, of the last two.
@pytest.mark.parametrize(
    ("stage", "parts"),
    [(1, [(2, 3), (1, 1), (2, 2)]), (2, [(1, 2), (2, 1), (4, 3)]), (3, [(2, 1), (4, 2), (1, 3)])],
)
def test_a_run_goes_on_at_any_world_size_and_zero_stage(
    small: Path, tmp_path: Path, stage: int, parts: list[tuple[int, int]]
) -> None:
    undisturbed = go(small, tmp_path / "one", stage).folder
    for at, (ranks, zero) in enumerate(parts):
        done = go(small, tmp_path / "run", stage, zero, ranks)
        assert f"from step {2 * at}" in done.err or at == 0
        if at < len(parts) - 1:
            forget_after(done.folder, 2 * at + 2)
    pairs = list(zip(curve(done.folder), curve(undisturbed), strict=True))
    for mine, theirs in pairs:
        assert mine == {k: pytest.approx(v, **SAME) if isinstance(v, float) else v for k, v in theirs.items()}
    mine, theirs = (load_file(folder / "export/model.safetensors") for folder in (done.folder, undisturbed))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4)


def state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All of a checkpoint by (state, parameter), put together from the ranks' files."""
    parts: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for file in folder.glob("rank-*.safetensors"):
        for name, value in load_file(file).items():
            key, start, parameter = name.split(":", 2)
            parts.setdefault((key, parameter), []).append((int(start), value))
    return {key: torch.cat([value for _, value in sorted(found)]) for key, found in parts.items()}


def test_moments_and_averages_are_reshaped_to_the_bit(tmp_path: Path) -> None:
    """Loaded at another world size and ZeRO stage and saved again at once, a checkpoint holds the same bits."""
    command = [sys.executable, str(ROOT / "tests/support/reshape.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first, *others = map(state, sorted(tmp_path.glob("*/step-00000003")))
    assert {key for key, _ in first} == {"weight", "exp_avg", "exp_avg_sq", "ema", "buffer"}
    assert len(others) == 5
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first)


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Path:
    """Stage 2 with a checkpoint a step and a validation after each, three kept."""
    options = ["--train.save_every", "1", "--train.eval_every", "1", "--train.keep", "2", "--train.lr", "3e-2"]
    return go(small, tmp_path, 2, options=options).folder


def test_the_newest_and_the_best_are_kept(run: Path) -> None:
    folder = run / "checkpoints"
    losses = {line["step"]: line["loss"] for line in curve(run) if line["split"] == "val" and line["step"] > 0}
    best = min(losses, key=losses.get)
    kept = {path.name for path in folder.glob("step-*")}
    assert kept == {f"step-{step:08d}" for step in (best, 5, 6)}
    assert (folder / "latest").read_text().strip() == "step-00000006"
    assert (folder / "best").read_text().strip() == f"step-{best:08d}"
    assert all(verify(folder / name) is None for name in kept)
    assert not list(folder.glob(f"{ASIDE}*"))


def test_damaged_checkpoints_never_push_out_the_good_one(small: Path, tmp_path: Path) -> None:
    """Newer ones that were passed over do not count among those that are kept."""
    folder = go(small, tmp_path, 2).folder / "checkpoints"
    for step in (1, 3, 4, 5, 6):
        (folder / f"step-{step:08d}" / "rank-00000.safetensors").write_bytes(b"damaged")
    shutil.rmtree(folder.parent / "export")
    done = go(small, tmp_path, 2, options=["--train.save_every", "3", "--train.keep", "1"])
    assert done.err.count("passed over") == 4
    assert "from step 2" in done.err
    assert [path.name for path in folder.glob("step-*")] == ["step-00000006"]
    assert verify(folder / "step-00000006") is None


DAMAGE = {
    "file missing": lambda path: (path / "rank-00001.safetensors").unlink(),
    "files swapped": lambda path: swap(path / "rank-00000.safetensors", path / "rank-00001.safetensors"),
    "file cut": lambda path: os.truncate(path / "rank-00000.safetensors", 100),
    "manifest missing": lambda path: (path / MANIFEST).unlink(),
    "manifest altered": lambda path: replace_in(path / MANIFEST, '"samples": 96', '"samples": 95'),
    "manifest of another kind": lambda path: (path / MANIFEST).write_text("[" * 100000),
    "manifest without files": lambda path: (path / MANIFEST).write_text('{"sha256": 1}'),
}


def swap(left: Path, right: Path) -> None:
    content = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(content)


def replace_in(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture(scope="module")
def of_two_ranks(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(small, tmp_path_factory.mktemp("two"), 1, ranks=2, options=[]).folder / "checkpoints/step-00000006"


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_was_altered_is_found(of_two_ranks: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(of_two_ranks, tmp_path / "step-00000006")
    assert verify(tmp_path / "step-00000006") is None
    DAMAGE[kind](tmp_path / "step-00000006")
    assert verify(tmp_path / "step-00000006") is not None
    found = [verify(tmp_path / "step-00000006", rank, 3) for rank in range(3)]
    assert any(found)  # the ranks share the work


def test_a_rank_opens_the_files_that_it_needs(of_two_ranks: Path) -> None:
    shares = [_held_by_share(of_two_ranks, rank, 2) for rank in range(2)]
    assert [list(share) for share in shares] == [[f"rank-0000{rank}.safetensors"] for rank in range(2)]
    manifest = {name: {"holds": holds} for share in shares for name, holds in share.items()}
    everything = state(of_two_ranks)
    for needed, (name, entry) in enumerate(manifest.items()):
        files = Files(of_two_ranks, manifest)
        for stored, numel in entry["holds"].items():
            key, start, parameter = stored.split(":", 2)
            read = files.read(Run(parameter, int(start), numel, 0, 0), key)
            assert torch.equal(read, everything[key, parameter][int(start) : int(start) + numel])
        assert list(files.opened) == [name] == [f"rank-0000{needed}.safetensors"]
    both = Files(of_two_ranks, manifest)
    for key, parameter in everything:
        whole = Run(parameter, 0, len(everything[key, parameter]), 0, 0)
        assert torch.equal(both.read(whole, key), everything[key, parameter])
    assert len(both.opened) == 2


def test_offload_resumes_without_and_back(small: Path, tmp_path: Path) -> None:
    undisturbed = go(small, tmp_path / "one", 2).folder
    offload = [*EVERY_STEP, "--deepspeed", str(ROOT / "ds_configs/offload.json")]
    folder = go(small, tmp_path / "run", 2, options=offload).folder
    forget_after(folder, 2)
    go(small, tmp_path / "run", 2, zero=2)
    forget_after(folder, 4)
    go(small, tmp_path / "run", 2, options=offload)
    for mine, theirs in zip(curve(folder), curve(undisturbed), strict=True):
        assert mine == {k: pytest.approx(v, **SAME) if isinstance(v, float) else v for k, v in theirs.items()}


@pytest.mark.parametrize("stage", (1, 3))
def test_second_partitions_within_a_node_change_no_bit(small: Path, tmp_path: Path, stage: int) -> None:
    """ZeRO++'s hpZ, on four ranks as if two of them were a node; through a resume, which must renew them too."""
    config = json.loads((ROOT / "ds_configs/zero3_nodes.json").read_text())
    for name, within in (("hpz", 2), ("plain", 1)):
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": within}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))

    def run(folder: str, name: str) -> Path:
        given = ["--deepspeed", str(tmp_path / f"{name}.json"), *EVERY_STEP]
        given += ["--train.batch_size", "16", "--train.micro_batch_size", "2"]
        return go(small, tmp_path / folder, stage, 3, 4, given).folder

    plain, hpz = run("plain", "plain"), run("hpz", "hpz")
    whole = load_file(plain / "export/model.safetensors")
    for resumed in (False, True):
        if resumed:
            forget_after(hpz, 2)
            run("hpz", "hpz")
        assert curve(hpz) == curve(plain)
        mine = load_file(hpz / "export/model.safetensors")
        assert all(torch.equal(mine[name], value) for name, value in whole.items())
