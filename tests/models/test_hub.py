"""Exports by timm's own ways, from a folder and from a hub."""

import base64
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
from huggingface_hub import ModelCard, constants

from models import (
    Segmenter,
    build_backbone,
    build_head,
    fingerprint,
    licence_of,
    linear_blocks,
    linearize,
    load,
    model_card,
    push_to_hub,
    read_config,
    save,
)

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


def test_to_a_hub_and_back(export, tmp_path):
    repository = tmp_path / "someone/vit"
    repository.mkdir(parents=True)

    class Hub(http.server.SimpleHTTPRequestHandler):
        """The hub, as far as `huggingface_hub` asks it for one repository."""

        def translate_path(self, path):
            return str(repository / path.rpartition("/")[2])

        def end_headers(self):
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("ETag", f'"{Path(self.path).name}"')
            super().end_headers()

        def do_POST(self):
            place = f"http://{self.headers['Host']}/someone/vit"
            sent = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
            if self.path == "/api/validate-yaml":  # of the card
                answer = {"errors": [], "warnings": []}
            elif "/preupload/" in self.path:
                answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                    for file in sent[0]["files"]]}  # fmt: skip
            elif "/commit/" in self.path:
                for line in sent[1:]:
                    (repository / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
                answer = {"commitUrl": f"{place}/commit/{'c' * 40}", "commitOid": "c" * 40}
            else:
                assert self.path == "/api/repos/create" and self.headers["Authorization"] == "Bearer hf_secret"
                assert sent[0]["name"] == "vit"
                answer = {"url": place}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = (
            f"import timm, models; print(models.push_to_hub({str(export)!r}, 'someone/vit', token='hf_secret')); "
            "vit = timm.create_model('hf-hub:someone/vit', pretrained=True); "
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
    commit = f"http://127.0.0.1:{server.server_port}/someone/vit/commit/{'c' * 40}"
    assert done.stdout.split() == [commit, *[fingerprint(load(export))] * 2]
    assert {path.name for path in repository.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = ModelCard.load(repository / "README.md")
    assert card.data.library_name == "timm" and card.data.license == "unknown" and "# vit\n" in card.text
    assert 'load("hf-hub:someone/vit")' in card.text and "`elu1`" in card.text and "| 1, 2 |" in card.text


def test_the_card_says_what_from_what(export):
    teacher = "vit_small_patch14_dinov2.lvd142m"
    assert licence_of(teacher) == "apache-2.0" and licence_of("local-dir:some") is None
    data = [{"stage": "2", "train": "photos", "trained": "backbone", "image_size": [32, 64]}]
    config = read_config(export) | {"lineage": {"teacher": {"name": teacher, "sha256": "abc"}, "data": data}}
    text = model_card(config, "apache-2.0", {"top1": 81.25, "step": 3}, "held out", ["python trainer/run.py --stage 2"])
    head = ModelCard(text).data
    assert (head.license, head.base_model, head.pipeline_tag) == (
        "apache-2.0", f"timm/{teacher}", "image-classification",
    )  # fmt: skip
    for said in (
        "| stage 2 | trained backbone on `photos`, 32 x 64 pixels |", "| top-1 (%) | 81.25 |", "images of `held out`",
        "python trainer/run.py --stage 2", "apache-2.0, as timm says", "| crop pct | `0.8` |", "tells 5 classes",
    ):  # fmt: skip
        assert said in text


def test_a_hub_that_has_no_such_export(monkeypatch, export):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    save_to = re.escape("hf-hub:someone/vit: cannot be put there")
    with pytest.raises(ValueError, match=save_to):
        push_to_hub(export, "someone/vit")
    for name in ("someone/none", "some one/no*ne"):
        with pytest.raises(ValueError, match=f"hf-hub:{re.escape(name)}: no export can be had") as error:
            load(f"hf-hub:{name}")
        assert "\n" not in str(error.value)
