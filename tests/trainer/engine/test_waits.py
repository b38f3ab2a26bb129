"""What a step waits for, counted on real engines of two ranks."""

import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import ENVIRONMENT, ROOT

Counts = dict[str, dict[str, float]]


def counted(ranks: int) -> Counts:
    command = [sys.executable, str(ROOT / "tests/support/waits.py"), str(ranks)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def counts() -> Counts:
    return counted(2)


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
    assert (one.pop(flag), three.pop(flag)) == (1, 3)
    assert one == three


def test_the_norm_is_one_collective(counts: Counts) -> None:
    assert all(found["allreduce_ engine.py:global_norm"] == 1 for found in counts.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_torch_sees_one_wait() -> None:
    for case, found in counted(1).items():
        assert sum(found.values()) <= 1.5, (case, found)  # half: before the first of the two steps
