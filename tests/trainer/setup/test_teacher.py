"""What an export says of its teacher."""

import json
from pathlib import Path

import pytest

from trainer.config import UserError
from trainer.setup.teacher import check_lineage, without_folder


def test_no_folder_of_the_users_disk_is_in_a_lineage_and_earlier_ones_still_fit(tmp_path: Path) -> None:
    assert without_folder("local-dir:/home/me/vit") == "local-dir:vit"
    assert without_folder("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    lineage = {
        "operator": "elu1",
        "operator_kwargs": {},
        "additions": [],
        "linear_blocks": [0],
        "stages": [],
        "data": [],
    }
    config = {"format": 1, "backbone": {"name": "vit_tiny_patch16_224", "kwargs": {}},
              "attention": {"operator": "elu1", "kwargs": {}, "additions": [], "linear_blocks": [0]}}  # fmt: skip

    def parent(name: str) -> Path:
        teacher = {"name": name, "kwargs": {}, "sha256": "abc"}
        (tmp_path / "config.json").write_text(json.dumps(config | {"lineage": lineage | {"teacher": teacher}}))
        return tmp_path

    ours = lineage | {"teacher": {"name": "local-dir:vit", "kwargs": {}, "sha256": "abc"}}
    for name in ("local-dir:vit", "local-dir:/home/me/vit"):
        assert check_lineage(parent(name), ours)["teacher"]["name"] == "local-dir:vit"
    with pytest.raises(UserError, match=r"its teacher.name is 'local-dir:other'"):
        check_lineage(parent("local-dir:/home/me/other"), ours)
