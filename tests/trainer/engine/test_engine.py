"""What DeepSpeed is told beside the file that `--deepspeed` names."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.config import UserError, parse
from trainer.engine.engine import deepspeed_config


@pytest.mark.parametrize(
    ("name", "ranks", "micro", "bf16", "kind"),
    [
        ("zero1", 2, 4, True, None),  # cannot be saved
        ("zero2", 2, 4, True, "fp32"),
        ("zero3", 2, 4, True, "fp32"),
        ("zero2", 2, 32, True, None),  # nothing to add up
        ("zero2", 2, 4, False, None),
        ("offload", 2, 4, True, None),
    ],
)
def test_gradients_of_micro_batches_add_up_in_fp32(name: str, ranks: int, micro: int, bf16: bool, kind: str) -> None:
    given = ["--deepspeed", str(ROOT / f"ds_configs/{name}.json"), "--train.batch_size", "64"]
    settings = parse(
        ["--stage", "2", *given, "--train.micro_batch_size", str(micro), "--train.bf16", str(bf16).lower()]
    )
    config = deepspeed_config(settings, ranks)
    assert config.get("data_types", {}).get("grad_accum_dtype") == kind


def test_the_file_has_the_last_word(tmp_path: Path) -> None:
    own = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"},
           "timers": {"throughput": {"enabled": True}}}  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(own))
    given = ["--deepspeed", str(tmp_path / "own.json"), "--train.batch_size", "64", "--train.micro_batch_size", "4"]
    config = deepspeed_config(parse(["--stage", "2", "--train.bf16", "true", *given]), 2)
    assert config["data_types"] == own["data_types"] and config["timers"] == own["timers"]


@pytest.mark.parametrize("name", ("zero1", "zero2", "zero3"))
def test_sending_overlaps_where_there_is_someone_to_send_to(name: str) -> None:
    settings = parse(["--stage", "2", "--deepspeed", str(ROOT / f"ds_configs/{name}.json")])
    overlaps = [deepspeed_config(settings, ranks)["zero_optimization"]["overlap_comm"] for ranks in (1, 2)]
    assert overlaps == [False, True]


def test_second_partitions_must_divide_the_ranks() -> None:
    settings = parse(["--stage", "2", "--deepspeed", str(ROOT / "ds_configs/zero3_nodes.json")])
    for ranks in (1, 4, 8, 16):  # on one node it is that node's ranks
        assert deepspeed_config(settings, ranks)["zero_optimization"]["zero_hpz_partition_size"] == 8
    settings.train.batch_size = 48
    with pytest.raises(UserError, match="zero_hpz_partition_size 8: needs a divisor of the 12 ranks"):
        deepspeed_config(settings, 12)
