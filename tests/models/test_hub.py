"""Exports by timm's own ways, from a folder and from a hub."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants

from models import Segmenter, build_backbone, build_head, fingerprint, linear_blocks, linearize, load, save

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
INPUT = {"image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "crop_pct": 0.8}


@pytest.fixture
def export(tmp_path):
    torch.manual_seed(0)
    vit = linearize(timm.create_model(NAME, **KWARGS), keep_softmax=[0])
    save(tmp_path / "export", vit.state_dict(), {
        "backbone": {"name": NAME, "kwargs": KWARGS}, "attention": {"feature_map": "elu1", "linear_blocks": [1, 2]},
        "input": INPUT, "classes": list("abcde"), "lineage": {},
    })  # fmt: skip
    return tmp_path / "export"


@torch.no_grad()
def test_timm_creates_what_load_gives(export):
    vit = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    assert fingerprint(vit) == fingerprint(load(export)) and linear_blocks(vit) == [1, 2]
    said = timm.data.resolve_model_data_config(vit)
    assert said["crop_pct"] == 0.8 and said["mean"] == (0.4, 0.5, 0.6) and vit.pretrained_cfg["label_names"][0] == "a"
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(vit(images), load(export)(images))

    random = timm.create_model(f"local-dir:{export}")
    assert linear_blocks(random) == [1, 2] and fingerprint(random) != fingerprint(vit)
    ten = timm.create_model(f"local-dir:{export}", pretrained=True, num_classes=10, img_size=(32, 64))
    assert ten(torch.rand(1, 3, 32, 64)).shape == (1, 10)
    assert fingerprint(ten.blocks) == fingerprint(vit.blocks)

    features = timm.create_model(f"local-dir:{export}", pretrained=True, features_only=True, out_indices=(0, -1))
    assert [tuple(x.shape) for x in features(images)] == [(2, 48, 4, 4)] * 2
    assert features.feature_info.channels() == [48, 48]
    last = vit.forward_intermediates(images, indices=[-1], intermediates_only=True)[0]
    assert torch.equal(features(images)[1], last)
    vit.set_input_size(img_size=(64, 32))
    vit.reset_classifier(3)
    assert vit(torch.rand(1, 3, 64, 32)).shape == (1, 3)


def test_a_segmenter_by_timms_way(tmp_path):
    kwargs = {**KWARGS, "num_classes": 0}
    model = Segmenter(timm.create_model(NAME, **kwargs), build_head("linear", 48, 2))
    save(tmp_path, model.state_dict(), {
        "backbone": {"name": NAME, "kwargs": kwargs}, "attention": {"feature_map": "elu1", "linear_blocks": []},
        "segmentation": {"head": "linear", "num_classes": 2, "kwargs": {}}, "lineage": {},
    })  # fmt: skip
    made = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert isinstance(made, Segmenter) and fingerprint(made) == fingerprint(model)


def test_what_is_no_export_is_said(export):
    with pytest.raises(ValueError, match="is no model of its own; give an export"):
        timm.create_model("unsoftmax")
    with pytest.raises(ValueError, match="an export, not a teacher"):
        build_backbone(f"local-dir:{export}")
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"backbone": {"name": "/etc", "kwargs": {}}}))
    for pretrained in (False, True):
        with pytest.raises(ValueError, match="no model can be built"):
            timm.create_model(f"local-dir:{export}", pretrained=pretrained)


def test_from_a_hub(export, tmp_path):
    class Hub(http.server.SimpleHTTPRequestHandler):
        """A repository `someone/vit`, as the hub answers for its files."""

        def translate_path(self, path):
            return str(export / path.rpartition("/")[2])

        def end_headers(self):
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("ETag", f'"{Path(self.path).name}"')
            super().end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = (
            "import timm, models; vit = timm.create_model('hf-hub:someone/vit', pretrained=True); "
            "print(models.fingerprint(vit), models.fingerprint(models.load('hf-hub:someone/vit')))"
        )
        env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "*",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=100)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [fingerprint(load(export))] * 2


def test_a_hub_that_has_no_such_export(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("someone/none", "some one/no*ne"):
        with pytest.raises(ValueError, match=f"hf-hub:{re.escape(name)}: no export can be had") as error:
            load(f"hf-hub:{name}")
        assert "\n" not in str(error.value)
