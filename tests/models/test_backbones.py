"""Teachers from names and from files, good and bad."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from models import architecture, build_backbone, check_image_size, fingerprint, match_dtypes, notes, read_weights

ROOT = Path(__file__).parents[2]
NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def build(name=NAME, **kwargs):
    torch.manual_seed(0)
    vit = timm.create_model(name, **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.normal_(std=0.2)
    return vit


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    return str(error.value)


WRAPPERS = {
    "plain.safetensors": lambda state: state,
    "plain.pth": lambda state: state,
    "plain.bin": lambda state: state,
    "state_dict.pth": lambda state: {"epoch": 3, "state_dict": state},
    "model.pth": lambda state: {"model": state, "optimizer": {}},
    "module.pth": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("file", WRAPPERS)
def test_a_local_file_gives_its_weights_and_its_head(tmp_path, file):
    vit = build()
    content = WRAPPERS[file](vit.state_dict())
    (save_file if file.endswith("safetensors") else torch.save)(content, tmp_path / file)
    built = build_backbone(NAME, TINY, tmp_path / file)
    assert fingerprint(built) == fingerprint(vit)
    assert built.head.out_features == 5 and not built.training
    assert next(built.parameters()).dtype == torch.float32


def test_a_file_in_bf16_gives_an_fp32_model(tmp_path):
    vit = build()
    save_file({key: value.bfloat16() for key, value in vit.state_dict().items()}, tmp_path / "w.safetensors")
    built = build_backbone(NAME, TINY, tmp_path / "w.safetensors")
    assert fingerprint(built) == fingerprint(vit.bfloat16().float())


def test_without_a_head_there_is_no_head(tmp_path):
    save_file(build(num_classes=0).state_dict(), tmp_path / "w.safetensors")
    assert isinstance(build_backbone(NAME, TINY, tmp_path / "w.safetensors").head, torch.nn.Identity)
    # A head, or attention pooling, that the user builds the model without stays in the file.
    vit = build("vit_base_patch16_siglip_224")
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    kwargs = {**TINY, "num_classes": 0, "global_pool": "avg", "fc_norm": False}
    bare = build_backbone("vit_base_patch16_siglip_224", kwargs, tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(bare.forward_features(x), vit.forward_features(x))


@pytest.mark.parametrize(("size", "grid"), [(48, (6, 6)), ((32, 64), (4, 8))])
def test_position_embeddings_are_resized_to_another_image_size(tmp_path, size, grid):
    vit = build(reg_tokens=4)
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    built = build_backbone(NAME, {**TINY, "reg_tokens": 4}, tmp_path / "w.safetensors", image_size=size)
    assert built.patch_embed.grid_size == grid
    wanted = resample_abs_pos_embed(vit.pos_embed, grid, num_prefix_tokens=5)  # bicubic, antialiased
    assert torch.equal(built.pos_embed, wanted) and wanted.shape == (1, 5 + grid[0] * grid[1], 48)
    height, width = (size, size) if isinstance(size, int) else size
    assert built(torch.rand(1, 3, height, width)).shape == (1, 5)


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_dinov2_in_its_original_names(tmp_path, registers):
    """The original repository's keys, register_tokens and mask_token among them; positions cover the class token."""
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    vit = build(name, num_classes=0, global_pool="token")
    original = dict(vit.state_dict(), mask_token=torch.zeros(1, 48))
    if registers:
        original["register_tokens"] = original.pop("reg_token")
        original["pos_embed"] = torch.cat([torch.full((1, 1, 48), 0.25), original["pos_embed"]], dim=1)
        original["cls_token"] = original["cls_token"] - 0.25
    torch.save(original, tmp_path / "dinov2.pth")
    built = build_backbone(name, TINY, tmp_path / "dinov2.pth")
    x = torch.randn(2, 3, 32, 32)
    assert built.num_prefix_tokens == 1 + registers
    torch.testing.assert_close(built.forward_features(x), vit.forward_features(x))


def test_deit3_in_its_original_names(tmp_path):
    vit = build("deit3_small_patch16_224")
    original = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
                for key, value in vit.state_dict().items()}  # fmt: skip
    torch.save({"model": original}, tmp_path / "deit3.pth")
    assert fingerprint(build_backbone("deit3_small_patch16_224", TINY, tmp_path / "deit3.pth")) == fingerprint(vit)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["zip", "raw"])
def test_a_malicious_pickle_is_not_executed(tmp_path, write):
    target, file = tmp_path / "executed", tmp_path / "evil.pth"
    write({"state_dict": build().state_dict(), "hook": Malicious(target)}, file)
    with pytest.raises(ValueError, match=r"evil\.pth: cannot be read as weights") as error:
        build_backbone(NAME, TINY, file)
    one_line(error)
    assert not target.exists()
    with contextlib.suppress(RuntimeError):  # it is no file of torch's when raw, which is seen after the harm
        torch.load(file, weights_only=False)
    assert target.exists()


def archive(path, content):
    """torch's format before 0.4, a tar of pickles."""
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
        lambda x, path: path.write_bytes(pickle.dumps(x, protocol=0)),
        lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
        lambda x, path: path.write_bytes(pickle.dumps(x)),
        lambda x, path: archive(path, pickle.dumps(x)),
    ],
    ids=["zip", "legacy", "pickle 0", "pickle 2", "pickle 4", "tar"],
)
def test_no_format_runs_code(tmp_path, write, suffix):
    file = tmp_path / f"evil{suffix}"
    write({"norm.weight": Malicious(tmp_path / "executed")}, file)
    said = rf"evil\{suffix}: cannot be read as weights: .*(get it again|none was run)"
    with pytest.raises(ValueError, match=said) as error:
        build_backbone(NAME, TINY, file)
    one_line(error)
    assert not (tmp_path / "executed").exists()


def lying(entries, data=b""):
    """A safetensors file with this header."""
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff" * 8 + b"{}", "header too large"),
        (lying({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**62]}}), "damaged"),
        (lying({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)), "damaged"),
        (lying({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (lying({"a": {"dtype": "X1", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (lying({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)), "damaged"),
        (lying({}), "holds no state dict"),
    ],
)  # fmt: skip
def test_lying_safetensors(tmp_path, content, said):
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.safetensors: .*{said}") as error:
        read_weights(file)
    assert len(one_line(error).removeprefix(str(tmp_path))) < 250


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({3: torch.zeros(2)}, "holds no state dict"),
        ({"state_dict": 3}, "holds no state dict"),
        ([torch.zeros(2)], "holds no state dict"),
        (torch.zeros(2), "holds no state dict"),
        ({"a": torch.zeros(3).to_sparse()}, "a is no plain tensor"),
        ({"a": torch.zeros(1).expand(10**12)}, "a is no plain tensor"),
        ({"a": torch.empty(3, device="meta")}, "a is no plain tensor"),
        (nn.Linear(2, 2), r"Python objects \(torch\.nn\.modules\.linear\.Linear\)"),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_of_plain_tensors(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth: .*{said}") as error:
        read_weights(tmp_path / "w.pth")
    one_line(error)


def spoiled(key, value):
    state = dict(build().state_dict())
    state[key] = state[key].clone()
    state[key].view(-1)[5] = value
    return state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (lambda: spoiled("blocks.1.attn.qkv.weight", float("nan")), r"blocks\.1\.attn\.qkv\.weight is not finite"),
        (lambda: spoiled("norm.bias", float("-inf")), r"norm\.bias is not finite"),
        (lambda: dict(build().state_dict(), **{"norm.bias": torch.zeros(48, dtype=torch.int32)}),
         r"1 of another kind of number \(norm\.bias int32\)"),
        (lambda: dict(build().state_dict(), **{"head.weight": torch.zeros(10**9, 0)}), "another shape"),
        (lambda: dict(build().state_dict(), **{"head.weight": torch.tensor(3.0)}), "another shape"),
    ],
    ids=["nan", "infinite", "integers", "endless head", "scalar head"],
)  # fmt: skip
def test_weights_that_cannot_be_meant(tmp_path, state, said):
    save_file(state(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"w\.safetensors: .*({said})") as error:
        build_backbone(NAME, {**TINY, "num_classes": 5}, tmp_path / "w.safetensors")
    one_line(error)


def test_the_architecture_behind_a_local_folder(tmp_path):
    """An export names timm's architecture, never a place that a reader would have to ask."""
    args = {key: value for key, value in TINY.items() if key != "img_size"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, "pretrained_cfg": {}, "model_args": args}))
    name, kwargs = architecture(f"local-dir:{tmp_path}", {"img_size": 32})
    assert (name, kwargs) == (NAME, {**args, "img_size": 32})
    assert architecture(NAME, {"depth": 2}) == (NAME, {"depth": 2})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: [s.pop(k) for k in list(s) if "blocks.1.mlp" in k],
         r"4 missing \(blocks\.1\.mlp\.fc1\.weight, blocks\.1\.mlp\.fc1\.bias, blocks\.1\.mlp\.fc2\.weight\)"),
        (lambda s: s.update({f"blocks.2.{k}": torch.zeros(1) for k in "abcd"}),
         r"4 unexpected \(blocks\.2\.a, blocks\.2\.b, blocks\.2\.c\)"),
        (lambda s: s.update({"norm.weight": torch.zeros(7)}),
         r"1 of another shape \(norm\.weight \(7,\) instead of \(48,\)\)"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 24, 48)}), "does not fit the model"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(48, 5)}), "does not fit the model"),
    ],
    ids=["missing", "unexpected", "shape", "positions", "patches"],
)  # fmt: skip
def test_a_file_that_does_not_fit_names_the_first_keys(tmp_path, change, said):
    state = dict(build().state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth: does not fit .*{said.removeprefix('does not fit ')}") as error:
        build_backbone(NAME, TINY, tmp_path / "w.pth")
    assert "mend teacher.name or teacher.kwargs" in one_line(error)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None], ids=["empty", "garbage", "truncated"])
def test_damaged_files(tmp_path, suffix, content):
    file = tmp_path / f"w{suffix}"
    (torch.save if suffix == ".pth" else save_file)(build().state_dict(), file)
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=r"cannot be read as weights") as error:
        build_backbone(NAME, TINY, file)
    one_line(error)


@pytest.mark.parametrize("content", [{}, [torch.zeros(1)], {"state_dict": {"a": 1}}, {3: {"b": torch.zeros(1)}}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: "):
        read_weights(tmp_path / "w.pth")


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file of weights"):
            build_backbone(NAME, TINY, path)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("vit_tiny_patch16_225", {}, r"teacher\.name 'vit_tiny_patch16_225': timm has no such model.*vit_"),
        ("nonsense", {}, r"timm has no such model$"),
        (f"{NAME}.nonsense", {}, r"timm cannot build it .*nonsense"),
        ("vit_tinny", {}, "but for example vit_tiny_patch16_224"),
        ("dinov2", {}, "but for example vit_base_patch14_dinov2"),
        ("vit_small_patch14_dinov2.lvd14m", {}, "'lvd14m', it has none so named, but for example lvd142m"),
        ("facebook/dinov2-small", {}, "write hf-hub:facebook/dinov2-small for a model on the hub"),
        ("hf_hb:timm/vit_tiny", {}, "here perhaps hf-hub:timm/vit_tiny"),
        ("local-dir:nowhere", {}, "no such folder with a config.json of timm's"),
        (NAME, {"depht": 2}, r"timm cannot build it with teacher\.kwargs .*depht.*perhaps depth is meant"),
        ("eva02_tiny_patch14_224", {"embed_dims": 48}, "perhaps embed_dim is meant"),
        (NAME, {"in_chans": 1}, r"teacher\.kwargs in_chans 1: images have 3 channels here"),
        (NAME, {"num_classes": -1}, r"teacher\.kwargs num_classes -1: a number of classes, or 0"),
        (NAME, {"checkpoint_path": "w.pth"}, r"teacher\.kwargs checkpoint_path: give the file as teacher\.weights"),
        (NAME, {"features_only": True}, r"teacher\.kwargs features_only: leave it out"),
        (NAME, {"num_heads": 5}, r"should be divisible by num_heads"),
        ("resnet18", {"img_size": 32}, r"img_size"),
    ],
)
def test_names_and_overrides_that_do_not_work(name, kwargs, said):
    with pytest.raises(ValueError, match=said) as error:
        build_backbone(name, kwargs, pretrained=False)
    one_line(error)


def test_overrides_that_do_not_fit_the_pretrained_weights_are_not_the_hubs_fault(tmp_path):
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    kwargs = {**TINY, "embed_dim": 24, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}}
    with pytest.raises(ValueError, match=r"timm cannot build it with teacher\.kwargs .*size mismatch") as error:
        build_backbone(NAME, kwargs)
    assert "\n" not in str(error.value)


def test_the_name_as_the_hub_writes_it():
    built = build_backbone(f"timm/{NAME}.augreg_in21k", TINY, pretrained=False)
    assert built.pretrained_cfg["tag"] == "augreg_in21k"
    assert architecture(f"timm/{NAME}", {"depth": 2}) == (NAME, {"depth": 2})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit"}, "its config.json is not timm's"),
        ({"architecture": "vit_nonsense", "pretrained_cfg": {}}, "describes 'vit_nonsense', which this timm does not"),
        ({"architecture": NAME, "pretrained_cfg": {"input_size": [1, 32, 32], "fixed_input_size": True}},
         "takes images of 1 channels"),
    ],
)  # fmt: skip
def test_folders_that_describe_something_else(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as error:
        build_backbone(f"local-dir:{tmp_path}", pretrained=False)
    one_line(error)


def test_pretrained_weights_are_all_there_whatever_the_number_of_classes(tmp_path):
    """timm itself leaves blocks random, without a word, that a file does not have, when the classes are others."""
    vit = build(num_classes=1000)
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    kwargs = {**TINY, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}, "num_classes": 7}
    built = build_backbone(NAME, kwargs)
    assert built.head.out_features == built.num_classes == 7
    assert fingerprint(built.blocks) == fingerprint(vit.blocks)
    with pytest.raises(ValueError, match=r"timm cannot build it .*Missing key.*blocks\.2"):
        build_backbone(NAME, {**kwargs, "depth": 3})


def test_timms_notes_are_shown_with_the_variant_that_they_want(tmp_path):
    name = "vit_base_patch16_clip_224.openai"
    save_file(build(name).state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=r"QuickGELU.*: vit_base_patch16_clip_quickgelu_224\.openai"):
        build_backbone(name, TINY, tmp_path / "w.safetensors")
    assert "vit_base_patch16_clip_quickgelu_224.openai" in notes(f"timm/{name}")[0]
    with warnings.catch_warnings(action="error"):
        build_backbone(name, TINY, pretrained=False)
        build_backbone(name, {**TINY, "act_layer": "quick_gelu"}, tmp_path / "w.safetensors")
        build_backbone("vit_base_patch16_clip_quickgelu_224.openai", TINY, tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb", NAME])
@torch.no_grad()
def test_softmax_blocks_after_their_parameters_alone_were_cast(name):
    """As DeepSpeed casts them; the key's bias of timm's EVA is a buffer."""
    vit = build(name)
    x = torch.rand(1, 3, 32, 32)
    wanted = vit.forward_features(x)
    for weight in vit.parameters():
        weight.data = weight.data.bfloat16()
    match_dtypes(vit)
    torch.testing.assert_close(vit.forward_features(x.bfloat16()).float(), wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("size", [30, (32, 36)])
def test_an_image_size_that_the_patch_does_not_divide(size):
    for where in ({"image_size": size}, {"kwargs": {**TINY, "img_size": size}}):
        with pytest.raises(ValueError, match="not a multiple of the patch size 8"):
            build_backbone(NAME, **{"kwargs": TINY, "pretrained": False, **where})
    build_backbone(NAME, {**TINY, "dynamic_img_size": True, "dynamic_img_pad": True}, None, False, size)
    check_image_size(build(), 64)


def test_an_unreachable_hub_is_said_at_once():
    """No retries for a minute, no log: one error that says how to give a local file, and settings as they were."""
    script = textwrap.dedent(f"""
        import time
        from huggingface_hub import constants
        from models import architecture, build_backbone
        start = time.monotonic()
        try:
            build_backbone("{NAME}", {TINY})
        except ValueError as error:
            print(error)
        assert time.monotonic() - start < 15 and not constants.HF_HUB_OFFLINE
    """)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent", "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | nowhere
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("\n") == 1
    assert NAME in done.stdout and "--teacher.weights FILE" in done.stdout


def test_offline_by_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be had from the hub.*--teacher\.weights FILE"):
        build_backbone(NAME, {**TINY, "cache_dir": tmp_path})
    assert time.monotonic() - start < 10 and constants.HF_HUB_OFFLINE


def test_fingerprint_changes_with_any_weight_and_not_with_order():
    vit = build()
    prints = {fingerprint(vit)}
    with torch.no_grad():
        for i, weight in enumerate(vit.state_dict().values()):
            weight.view(-1)[-1] += 1
            prints.add(fingerprint(vit))
            assert len(prints) == i + 2
            weight.view(-1)[-1] -= 1

    class Reversed(torch.nn.Module):
        def state_dict(self):
            return dict(reversed(vit.state_dict().items()))

    assert fingerprint(Reversed()) == fingerprint(vit)
    assert fingerprint(vit.bfloat16()) != fingerprint(vit.float())
