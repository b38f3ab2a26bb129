"""A short selection of the fault suite, and whether the suite sees what is wrong; `make faults` is all of it."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.suites.faults import EQUAL, ERROR, LOST, SKIPPED, UNEXPLAINED, Bench, Suite, differences, judge
from tests.suites.faults_damage import short, undamaged

WANTED = {"kills": 5, "disk": 1, "settings": 60, "beton": 2, "checkpoint": 2, "kept": 2, "text": 2, "hostile": 3}
WANTED |= {"lineage": 4}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults") / "bench", seed=0)


def test_nothing_is_lost_and_nothing_unexplained(bench: Bench) -> None:
    suite = Suite(bench, WANTED, minutes=10)
    suite.run()
    assert not suite.bad, "\n".join(suite.bad)
    assert not suite.short_of()
    total = sum(suite.table.values(), Counter())
    assert total[EQUAL] + total[ERROR] == total.total() - total[SKIPPED] >= sum(WANTED.values()) - 1


def test_the_suite_sees_what_is_wrong(bench: Bench, tmp_path: Path) -> None:
    reference = undamaged(bench).folder
    other = bench.finish(short(bench, tmp_path / "run", train_seed=1))
    outcome, said = judge(other, tmp_path / "run/stage2", reference, whole=False)
    assert outcome == LOST and "metrics.jsonl differs" in said and "export/model.safetensors differs" in said
    refused = bench.finish(short(bench, tmp_path / "none", train_lr=-1))
    assert judge(refused, tmp_path / "none/stage2", reference)[0] == ERROR
    killed = bench.start(short(bench, tmp_path / "none"))
    killed.kill()
    assert killed.code == -9
    assert judge(killed, tmp_path / "none/stage2", reference)[0] == UNEXPLAINED

    copy = tmp_path / "copy"
    shutil.copytree(reference, copy)
    assert differences(copy, reference) == []
    shard = next(copy.glob("checkpoints/step-00000006/*.safetensors"))
    state = load_file(shard)
    key = next(key for key in state if not key.startswith("weight"))  # of the optimizer
    state[key].view(-1)[0] += 1e-6
    save_file(state, shard)
    (found,) = differences(copy, reference)
    assert shard.name in found and "1 of" in found
