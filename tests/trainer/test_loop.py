"""The loop on real engines of two ranks: what a step waits for, and a stop within a step."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import ENVIRONMENT, ROOT
from trainer.ranks.signals import STOPPED

Counts = dict[str, dict[str, float]]


def looked_at(ranks: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests/support/steps.py"), str(ranks)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return looked_at(2)


@pytest.fixture
def counts(found: dict[str, Any]) -> Counts:
    return found["waits"]


def waits(found: dict[str, float]) -> dict[str, float]:
    """Of a step, without those once per call of the loop: the host's own questions before the first step."""
    collectives = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "broadcast_", "barrier")
    return {k: v for k, v in found.items() if not k.startswith(collectives) and "on_any_rank" not in k}


def test_a_step_waits_once_for_the_norm(counts: Counts) -> None:
    """Whatever the stage, the ZeRO stage, the micro-batches and the parameter groups."""
    for case, found in counts.items():
        assert waits(found) == {"copy to the host engine.py:global_norm": 1.0}, case


def test_a_micro_batch_has_one_collective_of_its_own(counts: Counts) -> None:
    """The stop flag, which nothing waits for."""
    one, three = counts["one micro-batch"], counts["three micro-batches"]
    flag = "allreduce_ signals.py:__call__"
    assert (one[flag], three[flag]) == (1, 3)
    assert one | {flag: 3} == three


def test_the_norm_is_one_collective(counts: Counts) -> None:
    assert all(found["allreduce_ engine.py:global_norm"] == 1 for found in counts.values())


def test_a_stop_is_heeded_within_a_step(found: dict[str, Any]) -> None:
    """By the rank that was not asked too, two micro-batches later; of the step that was begun nothing is left."""
    assert found["stop"] == {"status": STOPPED, "saved": [1], "made": 8, "seen": 5}


def test_many_micro_batches_add_up_in_fp32(found: dict[str, Any]) -> None:
    """In ZeRO 2 and 3. ZeRO 1 adds in bf16, and shows what that loses."""
    off = {zero: abs(ratio - 1) for zero, ratio in found["sums"].items()}
    assert off["zero 2"] < 2e-4 and off["zero 3"] < 2e-4 < off["zero 1"], off


def test_the_benchmark_of_steps_runs(found: dict[str, Any]) -> None:
    assert [row["target"] for row in found["bench"]] == [1.03, 2.0]
    assert all(row["ratio"] == row["ours"] / row["peer"] > 0 for row in found["bench"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_torch_sees_one_wait() -> None:
    counts = looked_at(1)["waits"]
    del counts["zero 3"]  # DeepSpeed waits after each backward there
    for case, found in counts.items():
        each_step = {place: count for place, count in found.items() if count >= 1}  # of two; the rest comes once
        assert sum(each_step.values()) <= 1, (case, found)
