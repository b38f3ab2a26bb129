"""Every mistake ends with one line on stderr, exit status 2 and no traceback, and nothing in the run folder changes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import models
from data.write import write
from tests.conftest import ARCHITECTURE, ENVIRONMENT, ROOT, Blobs, run_trainer
from tests.support.damage import damage
from trainer.config import UserError, parse
from trainer.main import main
from trainer.output.folder import StageFolder

UNTRAINED = ("--teacher.pretrained", "false", "--teacher.weights", "null", "--teacher.kwargs", "{}")
ANY_SIZE = ("--data.image_size", "null")
THREE_CLASSES = (*UNTRAINED[:4], "--teacher.kwargs", json.dumps(ARCHITECTURE | {"num_classes": 3}))


class Unlabelled:
    """The images of `Blobs` alone."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.blobs[index][0]}


@pytest.fixture(scope="module")
def bad(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "truncated.beton").write_bytes((small / "train.beton").read_bytes()[:20000])
    write(Unlabelled(Blobs(32, 0)), folder / "unlabelled.beton", raw_share=1.0, progress=False)
    (folder / "text.beton").write_text("not a beton " * 1000)

    (folder / "text.safetensors").write_text("hello")
    (folder / "text.pth").write_text("hello")
    torch.save({"epoch": 3, "names": ["a"]}, folder / "no_tensors.pth")
    save_file({"stem.weight": torch.zeros(3)}, folder / "other.safetensors")

    zero = {"stage": 1}
    configs = {
        "list": [1],
        "no_zero": {"train_batch_size": 16},
        "stage0": {"zero_optimization": {"stage": 0}},
        "batch": {"zero_optimization": zero, "train_batch_size": 999},
        "accumulation": {"zero_optimization": zero, "gradient_accumulation_steps": 4},
        "clipping": {"zero_optimization": zero, "gradient_clipping": 7.5},
        "bf16": {"zero_optimization": zero, "bf16": {"enabled": True}},
        "bf16_bare": {"zero_optimization": zero, "bf16": True},
        "fp16_bare": {"zero_optimization": zero, "fp16": True},
        "optimizer": {"zero_optimization": zero, "optimizer": {"type": "Adam"}},
        "top_key": {"zero_optimization": zero, "gradient_cliping": 1.0},
        "fp32_sums": {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}},
        "hpz": {"zero_optimization": zero | {"zero_hpz_partition_size": 2}},
        "zero_key": {"zero_optimization": {"stage": 1, "overlap_com": True}},
        "zero_value": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        "zero_type": {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
    }
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (folder / "cut.json").write_text('{"zero_optimization": {')

    recipes = {
        "unknown": "train: {lrr: 1}",
        "unknown_section": "trian: {lr: 1}",
        "unknown_in_stage": "stages: {1: {train: {lrr: 1}}}",
        "no_such_stage": "stages: {9: {}}",
        "stages_list": "stages: [1, 2]",
        "stage_number": "stages: {2: 3}",
        "section_number": "train: 3",
        "list": "- train",
        "cut": "train: {lr: [1",
        "kind": "train: {lr: fast}",
        "truth": "train: {batch_size: true}",
    }
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text + "\n")

    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, **ARCHITECTURE)
    teacher.load_state_dict(models.read_weights(small / "teacher.safetensors"))
    built, attention = {"name": "vit_tiny_patch16_224"}, {"feature_map": "elu1", "linear_blocks": [0, 1]}
    source = built | {"kwargs": ARCHITECTURE, "sha256": models.fingerprint(teacher)}
    lineage = {"teacher": source, **attention, "stages": ["1"], "data": []}
    backbone = built | {"kwargs": ARCHITECTURE | {"img_size": 32}}
    config = {"backbone": backbone, "attention": attention, "input": {}, "lineage": lineage}
    state = models.linearize(teacher).state_dict()
    other = lineage["teacher"] | {"sha256": "0" * 64}
    models.save(folder / "parent", state, config)
    models.save(folder / "parent_relu", state, config | {"lineage": lineage | {"feature_map": "relu"}})
    models.save(folder / "parent_other_teacher", state, config | {"lineage": lineage | {"teacher": other}})
    models.save(folder / "parent_one_block", state, config | {"lineage": lineage | {"linear_blocks": [1]}})
    models.save(folder / "parent_no_lineage", state, {k: v for k, v in config.items() if k != "lineage"})
    models.save(folder / "parent_half_lineage", state, config | {"lineage": {"teacher": lineage["teacher"]}})
    models.save(folder / "parent_other_weights", {"stem.weight": torch.zeros(3)}, config)
    models.save(folder / "parent_cut", state, config)
    whole = (folder / "parent_cut" / "model.safetensors").read_bytes()
    (folder / "parent_cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    models.save(folder / "parent_not_json", state, config)
    (folder / "parent_not_json" / "config.json").write_text("{")
    return folder


# What is wrong: the options, where {bad} and {small} stand for folders, and what the line must say.
MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # data
    "beton_missing": (("--data.train", "/nope.beton"), ("/nope.beton", "no such file", "data.write")),
    "beton_truncated": (("--data.train", "{bad}/truncated.beton"), ("truncated.beton", "truncated", "write it again")),
    "beton_val_truncated": (("--data.val", "{bad}/truncated.beton"), ("truncated.beton", "truncated")),
    "beton_text": (("--data.train", "{bad}/text.beton"), ("text.beton", "not a .beton")),
    "beton_folder": (("--data.train", "{bad}"), ("data.train", "holds no images", "other files passed over")),
    "labels_outside_head": (("--stage", "3", "--stage3.num_classes", "2"), ("train.beton", "up to 3", "2 classes")),
    "labels_outside_the_head": (
        ("--stage", "3", "--stage3.num_classes", "3"), ("train.beton", "labels up to 3", "3 classes"),
    ),
    "unlabelled": (("--stage", "3", "--data.train", "{bad}/unlabelled.beton"), ("unlabelled.beton", "no labels")),
    "unlabelled_val": (("--stage", "3", "--data.val", "{bad}/unlabelled.beton"), ("data.val", "no labels")),
    "image_size": (("--data.image_size", "36"), ("data.image_size", "36", "patch size 8")),
    "image_size_zero": (("--data.image_size", "0"), ("data.image_size 0", "at least 1")),
    "scale": (("--data.scale", "[0.5, 2]"), ("data.scale", "<= 1")),
    "hflip": (("--data.hflip", "2"), ("data.hflip", "at most 1")),
    "mean": (("--data.mean", "[0.5]"), ("data.mean", "three values")),
    # settings
    "unknown_setting": (("--train.lrr", "1"), ("--train.lrr", "did you mean train.lr")),
    "abbreviated_setting": (("--train.batch", "8"), ("--train.batch", "no such setting")),
    "stray_word": (("stray",), ("stray", "no such setting")),
    "no_value": (("--train.lr",), ("--train.lr", "expected one argument")),
    "recipe_missing": (("--config", "nope"), ("--config nope", "no such recipe", "cifar10")),
    "recipe_folder": (("--config", "{bad}"), ("no such recipe",)),
    "recipe_not_text": (("--config", "{small}/teacher.safetensors"), ("teacher.safetensors", "not YAML")),
    "recipe_cut": (("--config", "{bad}/cut.yaml"), ("cut.yaml", "not YAML")),
    "recipe_list": (("--config", "{bad}/list.yaml"), ("list.yaml", "mapping")),
    "recipe_unknown": (("--config", "{bad}/unknown.yaml"), ("unknown.yaml", "train.lrr", "did you mean train.lr?")),
    "recipe_section": (("--config", "{bad}/unknown_section.yaml"), ("trian", "did you mean train?")),
    "recipe_in_stage": (("--config", "{bad}/unknown_in_stage.yaml"), ("stages.1.train.lrr", "did you mean train.lr?")),
    "recipe_no_stage": (("--config", "{bad}/no_such_stage.yaml"), ("stages has no 9",)),
    "recipe_stages_list": (("--config", "{bad}/stages_list.yaml"), ("stages", "mapping")),
    "recipe_stage_number": (("--config", "{bad}/stage_number.yaml"), ("stages.2", "mapping")),
    "recipe_section_number": (("--config", "{bad}/section_number.yaml"), ("train 3", "mapping")),
    "recipe_kind": (("--config", "{bad}/kind.yaml"), ("train.lr fast", "a number above 0")),
    "recipe_truth": (("--config", "{bad}/truth.yaml"), ("train.batch_size True", "a whole number")),
    "truth_value": (("--train.bf16", "maybe"), ("train.bf16 maybe", "true or false")),
    "number_for_text": (("--train.steps", "many"), ("train.steps many", "a whole number")),
    "fraction_for_number": (("--train.batch_size", "1.5"), ("train.batch_size 1.5", "a whole number")),
    "choice": (("--stage2.loss", "mae"), ("stage2.loss mae", "mse")),
    "stage": (("--stage", "9"), ("stage 9", "1, 2, 3")),
    "stage_without_value": (("--stage",), ("--stage", "expected one argument")),
    "lr_negative": (("--train.lr", "-1"), ("train.lr -1", "above 0")),
    "lr_nan": (("--train.lr", "nan"), ("train.lr nan", "a number above 0")),
    "steps_zero": (("--train.steps", "0"), ("train.steps 0", "at least 1")),
    "betas": (("--train.betas", "[0.9]"), ("train.betas", "two values")),
    "warmup_negative": (("--train.warmup_steps", "-1"), ("train.warmup_steps -1", "at least 0")),
    "seed_negative": (("--train.seed", "-1"), ("train.seed -1", "at least 0")),
    "label_smoothing": (("--stage", "3", "--stage3.label_smoothing", "1.5"), ("stage3.label_smoothing", "below 1")),
    "drop_path": (("--stage", "3", "--stage3.drop_path", "1.5"), ("stage3.drop_path", "below 1")),
    "ema": (("--stage", "3", "--stage3.ema", "1.5"), ("stage3.ema", "below 1")),
    "mixup_odd": (("--stage", "3", "--train.batch_size", "3", "--stage3.mixup", "0.5"), ("mixup", "3 images", "even")),
    "batch_too_large": (("--train.batch_size", "97"), ("train.batch_size 97", "96 images")),
    "micro_batch_zero": (("--train.micro_batch_size", "0"), ("train.micro_batch_size 0", "at least 1")),
    # teacher and student
    "softmax_student": (("--student.attention", "softmax"), ("student.attention softmax", "stage 3")),
    "feature_map": (("--student.operator", "nope"), ("operator 'nope'", "elu1")),
    "keep_softmax": (("--student.keep_softmax", "[7]"), ("keep_softmax [7]", "blocks 0 to 1")),
    "keep_softmax_all": (("--stage", "1", "--student.keep_softmax", "[0, 1]"), ("keep_softmax", "no block")),
    "trainable_head": (("--stage", "1", "--student.trainable", "head"), ("student.trainable head", "qkv")),
    "trainable_none": (
        ("--stage", "3", "--student.attention", "softmax", "--student.trainable", "qkv"), ("student.trainable qkv",)),
    "no_attention": ((*UNTRAINED, *ANY_SIZE, "--teacher.name", "resnet18"), ("ResNet", "cannot be linearised")),
    "relative_position": (
        (*UNTRAINED, "--teacher.name", "vit_relpos_small_patch16_224", "--teacher.kwargs", '{"depth": 1}'),
        ("VisionTransformerRelPos", "cannot be linearised")),
    "relative_position_beit": (
        (*UNTRAINED, "--teacher.name", "beit_base_patch16_224", "--teacher.kwargs", '{"depth": 1}'),
        ("Beit", "cannot be linearised")),
    "windows": ((*UNTRAINED, *ANY_SIZE, "--teacher.name", "swin_tiny_patch4_window7_224"), ("Swin", "linearised")),
    "unknown_model": (("--teacher.name", "vit_nope"), ("teacher.name 'vit_nope'", "no such model")),
    "unknown_override": (("--teacher.kwargs", '{"dept": 2}'), ("teacher.kwargs", "dept")),
    "override_not_mapping": (("--teacher.kwargs", "x"), ("teacher.kwargs x",)),
    "teacher_missing": (("--teacher.weights", "/nope.pth"), ("/nope.pth", "no such file")),
    "teacher_of_other_names": (
        ("--teacher.weights", "{bad}/other.safetensors"),
        ("other.safetensors", "no patch embedding of a ViT", "stem.*", "use a file")),
    "teacher_of_other_size": (("--teacher.kwargs.embed_dim", "64"), ("teacher.safetensors", "cls_token (1, 1, 32)")),
    "teacher_text": (("--teacher.weights", "{bad}/text.safetensors"), ("text.safetensors", "cannot be read")),
    "teacher_text_pth": (("--teacher.weights", "{bad}/text.pth"), ("text.pth", "cannot be read")),
    "teacher_no_tensors": (("--teacher.weights", "{bad}/no_tensors.pth"), ("no_tensors.pth", "no state dict")),
    # DeepSpeed's configuration
    "zero_missing": (("--deepspeed", "/nope.json"), ("/nope.json", "ds_configs")),
    "zero_cut": (("--deepspeed", "{bad}/cut.json"), ("cut.json", "not JSON")),
    "zero_list": (("--deepspeed", "{bad}/list.json"), ("list.json", "zero_optimization")),
    "zero_no_section": (("--deepspeed", "{bad}/no_zero.json"), ("no section zero_optimization",)),
    "zero_stage_0": (("--deepspeed", "{bad}/stage0.json"), ("zero_optimization.stage", "1, 2 or 3")),
    "zero_batch": (("--deepspeed", "{bad}/batch.json"), ("train_batch_size 999", "train.batch_size", "16")),
    "zero_accumulation": (("--deepspeed", "{bad}/accumulation.json"), ("gradient_accumulation_steps 4", "contradicts")),
    "zero_clipping": (("--deepspeed", "{bad}/clipping.json"), ("gradient_clipping 7.5", "train.clip_grad")),
    "zero_bf16": (("--deepspeed", "{bad}/bf16.json"), ("bf16", "contradicts train.bf16")),
    "zero_bf16_bare": (("--deepspeed", "{bad}/bf16_bare.json"), ("bf16 True", "section")),
    "zero_fp16_bare": (("--deepspeed", "{bad}/fp16_bare.json"), ("fp16 True", "section")),
    "zero_optimizer": (("--deepspeed", "{bad}/optimizer.json"), ("optimizer", "train settings")),
    "zero_top_key": (("--deepspeed", "{bad}/top_key.json"), ("gradient_cliping", "gradient_clipping")),
    "zero_1_fp32_sums": (
        ("--train.bf16", "true", "--deepspeed", "{bad}/fp32_sums.json"), ("grad_accum_dtype", "stage 2 or 3")),
    "zero_3_compile": (
        ("--train.compile", "true", "--deepspeed", "ds_configs/zero3.json"), ("train.compile", "ZeRO 3", "zero2.json"),
    ),
    "zero_hpz": (("--deepspeed", "{bad}/hpz.json"), ("zero_hpz_partition_size 2", "needs stage 3")),
    "zero_key": (("--deepspeed", "{bad}/zero_key.json"), ("zero_key.json", "zero_optimization.overlap_com")),
    "zero_value": (("--deepspeed", "{bad}/zero_value.json"), ("zero_optimization.offload_optimizer.device", "'cpu'")),
    "zero_type": (("--deepspeed", "{bad}/zero_type.json"), ("zero_optimization.offload_optimizer",)),
    # the parent
    "parent_missing": (("--student.parent", "/nope"), ("/nope", "no export")),
    "parent_feature_map": (("--student.parent", "{bad}/parent_relu"), ("operator is 'relu'", "'elu1'")),
    "parent_teacher": (("--student.parent", "{bad}/parent_other_teacher"), ("teacher.sha256", "--student.parent")),
    "parent_blocks": (("--student.parent", "{bad}/parent_one_block"), ("linear_blocks is [1]", "[0, 1]")),
    "parent_no_lineage": (("--student.parent", "{bad}/parent_no_lineage"), ("config.json", "lineage", "damaged")),
    "parent_half_lineage": (("--student.parent", "{bad}/parent_half_lineage"), ("lineage has no operator",)),
    "parent_weights": (("--student.parent", "{bad}/parent_other_weights"), ("model.safetensors", "stem.weight")),
    "parent_cut": (("--student.parent", "{bad}/parent_cut"), ("model.safetensors", "cannot be read")),
    "parent_not_json": (("--student.parent", "{bad}/parent_not_json"), ("config.json", "damaged")),
}  # fmt: skip


def one_line(capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    """The error line of `main(argv)`, which ends with status 2 and says nothing else."""
    capsys.readouterr()
    code = main(argv)
    said = capsys.readouterr()
    assert code == 2, said.out
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_and_nothing_written(mistake: str, small: Path, bad: Path, tmp_path: Path, capsys) -> None:
    options, words = MISTAKES[mistake]
    options = [option.replace("{bad}", str(bad)).replace("{small}", str(small)) for option in options]
    run = tmp_path / "run"
    # --dry_run: should a mistake go through, nothing is trained in the tests' own process.
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(run), "--dry_run", *options]
    line = one_line(capsys, argv)
    assert not [word for word in words if word not in line], line
    assert not run.exists()


def test_fitting_parent_is_accepted(small: Path, bad: Path, tmp_path: Path, capsys) -> None:
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path / "run"), "--dry_run"]
    assert main([*argv, "--student.parent", str(bad / "parent")]) == 0
    assert "after stage 1" in capsys.readouterr().out


def test_stage_missing(small: Path, capsys) -> None:
    assert "one of 1, 2, 3, probe" in one_line(capsys, ["--config", str(small / "recipe.yaml")])


@pytest.mark.parametrize("run", ["/proc/nope", "{small}/recipe.yaml"])
def test_run_folder_cannot_be_made(run: str, small: Path, capsys) -> None:
    before = contents(small)
    run = run.replace("{small}", str(small))
    line = one_line(capsys, ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", run])
    assert run in line and "cannot be written" in line
    assert contents(small) == before


def test_run_folder_of_other_settings(small: Path, tmp_path: Path, capsys) -> None:
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path / "run")]
    settings = parse(argv)
    StageFolder(settings).claim(settings, rank=0)
    (tmp_path / "run" / "stage2" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "run" / "stage2" / "checkpoints" / "step-00000001").mkdir(parents=True)
    before = contents(tmp_path)
    for option, value, was, now in (
        ("--train.lr", "0.5", "train.lr was 0.001", "is now 0.5"),
        ("--student.operator", "relu", "student.operator was 'elu1'", "is now 'relu'"),
        ("--data.image_size", "64", "data.image_size was 32", "is now 64"),
    ):
        line = one_line(capsys, [*argv, option, value])
        assert was in line and now in line and "--run" in line, line
    assert contents(tmp_path) == before
    kept = tmp_path / "run" / "stage2" / "config.yaml"
    for content in (b"a: [", b"\xff\xfe\x00", b"text"):
        kept.write_bytes(content)
        assert "damaged" in one_line(capsys, argv)
        assert kept.read_bytes() == content


def test_hub_unreachable(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    hub = ("--teacher.weights", "null", "--teacher.kwargs", "{}", "--data.image_size", "null")
    done = run_trainer(small, tmp_path / "run", 2, *hub, launcher=True)
    assert "hub" in done.error and "--teacher.weights FILE" in done.error
    assert not (tmp_path / "run").exists()


def test_ranks_say_it_once(small: Path, tmp_path: Path) -> None:
    done = run_trainer(small, tmp_path / "run", 2, "--train.batch_size", "15", ranks=2, launcher=True)
    assert "train.batch_size 15" in done.error and "2 ranks" in done.error
    assert not (tmp_path / "run").exists()


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until `path` has a line of training."""
    end = time.monotonic() + seconds
    while not (path.is_file() and '"train"' in path.read_text()):
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.1)


def test_a_damaged_image_is_named(small: Path, tmp_path: Path) -> None:
    shutil.copy(small / "train.beton", tmp_path)
    damage(tmp_path / "train.beton", "flip image", np.random.default_rng(0))
    done = run_trainer(small, tmp_path / "run", 1, "--data.train", str(tmp_path / "train.beton"))
    assert re.search(r"train\.beton: image \d+ is damaged; write it again", done.error)


def test_two_processes_on_one_run_folder(small: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    metrics = run / "stage2" / "metrics.jsonl"
    options = ["--train.steps", "1000000", "--train.save_every", "1000000"]
    command = [sys.executable, "trainer/run.py", "--config", str(small / "recipe.yaml"), "--stage", "2"]
    own = ["--run", str(run), "--train.log_every", "20"]
    with log.open("w") as file:
        first = subprocess.Popen([*command, *options, *own], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    try:
        wait_for(metrics, first)
        kept = (run / "stage2" / "config.yaml").read_bytes()
        second = run_trainer(small, run, 2, *options)
        assert "another process" in second.error and str(run) in second.error
        assert (run / "stage2" / "config.yaml").read_bytes() == kept
        assert first.poll() is None
        lines = len(metrics.read_text().splitlines())
        first.send_signal(signal.SIGTERM)
        assert first.wait(180) == 75, log.read_text()
    finally:
        first.kill()
        first.wait()
    after = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(after) >= lines
    steps = [line["step"] for line in after if line["split"] == "train"]
    assert steps == list(range(20, 20 * len(steps) + 1, 20))  # nothing lost, nothing twice
    (saved,) = (run / "stage2" / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) >= steps[-1]
    assert "error: " not in log.read_text()


def test_no_space_left_for_a_checkpoint(small: Path, disk: Path) -> None:
    options = ["--train.save_every", "1", "--train.keep", "100", "--data.val", "null"]
    full = run_trainer(small, disk / "run", 2, *options)
    assert "no space left" in full.error and "make room" in full.error
    checkpoints = disk / "run" / "stage2" / "checkpoints"
    saved = sorted(path.name for path in checkpoints.glob("step-*"))
    assert {path.name for path in checkpoints.iterdir()} == {*saved, "latest"}  # nothing half-written
    assert 1 <= len(saved) < 6 and saved[-1] == f"step-{len(saved):08d}"
    assert f"resumes from step {len(saved)}" in full.error
    before = contents(checkpoints)
    del before["latest"]

    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    resumed = run_trainer(small, disk / "run", 2, *options)
    assert resumed.code == 0, resumed.err
    line = f"stage 2, feature alignment: vit_tiny_patch16_224, elu1, from step {len(saved)}, to step 6; "
    line += f"32 x 32 pixels, 17 tokens; batch 16 = 1 rank x 1 x 16; in {disk}/run/stage2\n"
    assert line in resumed.err
    log = (disk / "run/stage2/log.txt").read_text()
    assert "DeepSpeed" in log and "areas averaged" in log and "DeepSpeed" not in resumed.out + resumed.err
    assert "warning" not in resumed.err.replace("[WARNING]", "")
    assert [line["step"] for line in resumed.lines("train")] == [1, 2, 3, 4, 5, 6]
    after = contents(checkpoints)
    assert {name: after[name] for name in before} == before
    assert (resumed.folder / "export" / "config.json").is_file()


def test_no_space_left_for_the_export_or_the_settings(small: Path, disk: Path) -> None:
    settings = parse(["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(disk / "run")])
    folder = StageFolder(settings)
    config = {"backbone": {"name": "vit_tiny_patch16_224", "kwargs": {}}, "attention": {"linear_blocks": [0]}}
    with pytest.raises(UserError, match=r"export: cannot be written .*[Nn]o space left.*make room"):
        folder.write_export({"weight": torch.zeros(1_000_000)}, config, settings)
    assert not folder.complete
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(UserError, match=r"cannot be written .*no space left"):
        folder.claim(settings, rank=0)
    assert not (folder.path / "config.yaml").exists()
