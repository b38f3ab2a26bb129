"""The report of real run folders, opened in Chromium; of damaged ones; and of several."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import yaml
from PIL import Image
from scipy.stats import binomtest

from data.write import write
from tests.conftest import ROOT, Blobs, Patches, curve, forget_after, run_trainer
from tests.support.browser import opened
from trainer.config import as_dict, first_difference, parse
from trainer.report.__main__ import main

HOSTILE = "<script>document.title='taken'</script>"
VERDICT = {
    "models": {"teacher": {}, "student": {}}, "intervals": "95 %: Wilson", "device": "CPU", "dtype": "fp32",
    "results": [
        {"measure": "k-NN", "model": "teacher", "value": 90.5, "low": 88.0, "high": 92.5, "unit": "%", "images": 22,
         "pooling": "pooled"},
        {"measure": "k-NN", "model": "student", "value": 80.25, "low": 77.0, "high": 83.0, "unit": "%", "images": 22,
         "pooling": "pooled", "to": "teacher", "difference": -10.25, "half": 2.5},
        *({"measure": "throughput", "model": model, "value": speed / size, "low": 1.0, "high": 2.0, "size": size,
           "batch_size": 8} for model, speed in (("teacher", 9e4), ("student", 4e5)) for size in (32, 64)),
    ],
}  # fmt: skip


class Hostile(Blobs):
    classes = (HOSTILE, "b & b", 'c" onload="x', "$d^{$")


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1 and 2 and a probe, with class names that are HTML; stage 2 was killed and went on."""
    folder = tmp_path_factory.mktemp("report")
    write(Hostile(22, 1), folder / "val.beton", raw_share=1.0, progress=False)
    write(Hostile(96, 0), folder / "train.beton", raw_share=1.0, progress=False)
    files = ["--data.train", str(folder / "train.beton"), "--data.val", str(folder / "val.beton")]
    files += ["--student.keep_softmax", "auto:1"]
    run, one = folder / "<b>$run", ["--tracking", "[wandb, tensorboard]"]
    two = ["--train.save_every", "3", "--train.keep", "9", "--train.eval_every", "2"]
    probe = ["--probe.modules", "[blocks.*.act, norm]", "--probe.solver", "ridge", "--probe.validation", "0.25"]
    for stage, options in ((1, one), (2, two), ("probe", probe)):
        done = run_trainer(small, run, stage, *files, *options)
        assert done.code == 0, done.err
        if stage == 2:
            forget_after(done.folder, 3)
            assert run_trainer(small, run, stage, *files, *options).code == 0
    (run / "evaluate").mkdir()
    (run / "evaluate/results.json").write_text(json.dumps(VERDICT))
    return run


def page_of(tmp_path: Path, *runs: Path) -> str:
    """The report's text; its tags are left out."""
    assert main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    body = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_a_browser_shows_it_and_complains_of_nothing(run: Path, tmp_path: Path) -> None:
    assert main([str(run)]) == 0
    page = run / "report.html"
    dom, console = opened(page)
    assert console == []
    titles = re.findall(r"<h2>(.*?)</h2>", dom)
    assert titles == [
        "What is missing", "What was converted from what", "Results", "Training", "Where error is made",
        "Which blocks keep softmax", "Patch features", "Linear probes", "Accuracy by class", "The verdict",
        "Speed by resolution", "Restarts", "To get it again",
    ]  # fmt: skip
    # Loss, rate and speed of two stages, top-1 and cosine of the second; errors and entropy; two of the ranking; speed.
    assert dom.count('<svg viewBox="') == 3 + 5 + 2 + 2 + 1
    assert len(re.findall(r'<img src="data:image/webp;base64,[^"]{99,}"', dom)) == 3 * 8
    assert len(re.findall(r'<tr class="(?:teacher|start|student)">', dom)) == 4
    assert "<script" not in dom and "<b>$run" not in dom and "&lt;script&gt;document" in dom
    assert not re.search(r"(src|href)=\"(?!data:|#)", dom)
    # That a complaint would be seen:
    text = page.read_text().replace("</main>", '<img src="https://example.org/x.png"></main>')
    (tmp_path / "other.html").write_text(text)
    assert "Content Security Policy" in opened(tmp_path / "other.html")[1][0]


def test_figures_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    text = page_of(tmp_path, run)
    last = curve(run / "stage2", "val")[-1]
    hits = round(last["top1"] * 22 / 100)
    interval = binomtest(hits, 22).proportion_ci(method="wilson")
    assert f"{last['top1']:.2f} % {100 * interval.low:.1f} to {100 * interval.high:.1f}" in text
    assert f"{last['feature_cosine']:.3f}" in text
    kept = json.loads((run / "stage1/blocks.json").read_text())["softmax"]
    assert f"Chosen by measured damage: block {kept[0]}." in text
    assert "1 restart survived" in text and "Stage 3, supervised fine-tuning, has not run." in text
    assert "k-NN pooled 90.5 % 88.0 to 92.5 80.2 % 77.0 to 83.0 -10.2 ± 2.5 to teacher" in text
    assert "Tokens 17, 1 of them prefix" in text
    for line in json.loads((run / "probe/results.json").read_text())["advice"]:
        assert " ".join(line.split()) in text


def test_stages_tell_it_image_by_image_and_class_by_class(run: Path) -> None:
    last = curve(run / "stage2", "val")[-1]
    classes = json.loads((run / "stage2/classes.json").read_text())["classes"]
    assert list(classes) == list(Hostile.classes) and sum(c["images"] for c in classes.values()) == last["images"] == 22
    for key in ("top1", "teacher_top1"):
        mean = sum(c["images"] * c[key] for c in classes.values()) / 22
        assert mean == pytest.approx(last[key])
    rows = json.loads((run / "stage2/pictures/features.json").read_text())["rows"]
    assert len(rows) == 8 and sorted(row["label"] for row in rows) == sorted(2 * Hostile.classes)
    assert all(-1 <= row["cosine"] <= 1 and row["student"]["class"] in Hostile.classes for row in rows)
    with Image.open(run / "stage2/pictures/features.png") as picture:
        assert max(box[3] for row in rows for box in row["tiles"].values()) < picture.height
    values = curve(run / "stage1", "val")[-1]
    assert {f"teacher_entropy.blocks.{i}" for i in range(2)} <= values.keys()
    assert (run / "stage1/pictures/errors.png").is_file() and (run / "stage1/blocks.png").is_file()
    sent = {path.name.split("_")[0] for path in (run / "stage1").glob("wandb/*/files/media/images/pictures/*.png")}
    assert sent == {"blocks", "errors"}
    lines = [json.loads(line) for line in (run / "stage2/metrics.jsonl").read_text().splitlines()]
    starts = [json.loads(line) for line in (run / "stage2/starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 3]
    assert starts[0]["time"] < starts[1]["time"] < lines[-1]["time"]


def test_the_commands_give_the_same_settings(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    commands = re.search(r"<pre>(.*?)</pre>", (tmp_path / "page.html").read_text(), re.DOTALL)[1]
    commands = [shlex.split(unescape(line)) for line in commands.strip().splitlines()]
    assert [command[:2] for command in commands] == [["deepspeed", "trainer/run.py"]] * 3
    for command, stage in zip(commands, ("stage1", "stage2"), strict=False):
        before = yaml.safe_load((run / stage / "config.yaml").read_text())
        assert first_difference(before, json.loads(json.dumps(as_dict(parse(command[2:]))))) is None


# What is done to copies of the run: a file or folder, what it then holds (None: it is gone), what the page says of it.
DAMAGE = [
    [
        ("stage2/config.yaml", b"a: [1", "stage2/config.yaml: not YAML"),
        ("stage1/blocks.json", b'{"alone": 3}', "blocks.json: is not a ranking"),
        ("probe/results.json", b'{"results": [{"model": 1}]}', "the section 'probe' cannot be made"),
        ("evaluate/results.json", b"[]", "evaluate/results.json: is no JSON object"),
    ],
    [
        ("stage2/metrics.jsonl", b'{"step": 1, "split": "val"}\n{"step": 9, "lo', "1 of its lines is damaged"),
        ("stage2/pictures/features.png", b"PNG", "the section 'features' cannot be made"),
        ("stage2/export/model.safetensors", b"x" * 99, "model.safetensors: damaged"),
        ("stage2/classes.json", b'{"classes": {"a": {}}}', "the section 'classes' cannot be made"),
    ],
    [
        ("stage2/metrics.jsonl", b"\xff\x00\n" * 3, "3 of its lines are damaged"),
        ("stage2/pictures/features.json", b'{"rows": [{}]}', "features.json: damaged"),
        ("stage2/export/config.json", b"{", "export/config.json: damaged"),
    ],
    [
        ("stage2/metrics.jsonl", b'{"step": 1, "split": "train", "loss": [], "lr": "x"}', "no evaluation"),
        ("stage2/config.yaml", None, "Stage 2"),
        ("stage2/starts.jsonl", b'{"time": "x", "step": 0}', "the section 'robustness' cannot be made"),
    ],
    [("stage2", None, "Stage 2, feature alignment, has not run.")],
    [("stage2/export", None, "Stage 2 is not finished: step 6 of 6")],
]


@pytest.mark.parametrize("damages", DAMAGE, ids=[damages[0][0] for damages in DAMAGE])
def test_what_is_missing_or_damaged_is_named(run: Path, tmp_path: Path, damages: list) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("wandb", "checkpoints", "tensorboard"))
    for name, content, _ in damages:
        if content is not None:
            (copy / name).write_bytes(content)
        elif (copy / name).is_dir():
            shutil.rmtree(copy / name)
        else:
            (copy / name).unlink()
    text = page_of(tmp_path, copy)
    assert [said for _, _, said in damages if said not in text] == []
    assert "Where error is made" in text


def test_runs_are_compared_and_seeds_are_summed_up(small: Path, run: Path, tmp_path: Path) -> None:
    def changed(name: str, **options: object) -> Path:
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("wandb", "checkpoints", "probe"))
        for stage in ("stage1", "stage2"):
            path = tmp_path / name / stage / "config.yaml"
            settings = yaml.safe_load(path.read_text())
            for key, value in options.items():
                settings["train" if key == "seed" else "student"][key] = value
            path.write_text(yaml.safe_dump(settings))
        return tmp_path / name

    runs = [changed("first"), changed("second", seed=1), changed("sharp", operator="focused")]
    path = runs[1] / "stage2/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    top1 = lines[-1]["top1"] if lines[-1]["split"] == "val" else [x for x in lines if x["split"] == "val"][-1]["top1"]
    path.write_text("".join(json.dumps(x | ({"top1": 0.0} if x["split"] == "val" else {})) + "\n" for x in lines))
    text = page_of(tmp_path, *runs)
    assert "3 runs compared" in text and "student.operator train.seed" in text
    assert "first, second student.operator elu1" in text
    assert f"{top1 / 2:.2f} 0.00 to {top1:.2f}" in text
    assert "Loss, stage 2" in text


def test_a_softmax_baseline_stands_in_the_table(run: Path, tmp_path: Path) -> None:
    stage = tmp_path / "beside/stage3"
    shutil.copytree(run / "stage2", stage, ignore=shutil.ignore_patterns("wandb", "checkpoints", "pictures"))
    settings = yaml.safe_load((stage / "config.yaml").read_text())
    settings["student"]["attention"] = "softmax"
    (stage / "config.yaml").write_text(yaml.safe_dump(settings))
    text = page_of(tmp_path, run, tmp_path / "beside")
    assert "Softmax baseline, stage 3 (beside)" in text
    assert "vit_tiny_patch16_224, the softmax baseline." in text
    assert "Stage 1, attention alignment, has not run." not in text


def test_masks_are_shown(small: Path, tmp_path: Path) -> None:
    masks = ["--task", "segmentation", "--student.parent", "none", "--train.steps", "2"]
    files = ["--data.train", str(small / "masked.beton"), "--data.val", str(small / "masked_val.beton")]
    done = run_trainer(small, tmp_path / "run", 3, *masks, *files)
    assert done.code == 0, done.err
    text = page_of(tmp_path, tmp_path / "run")
    assert "semantic segmentation done" in text and "The worst images" in text
    assert all(f"{name} " in text for name in Patches.mask_classes)
    assert f"{done.lines('val')[-1]['miou']:.2f} %" in text


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    for argv, said in (
        ([str(tmp_path / "none")], "none: no such run folder"),
        ([str(tmp_path / "empty")], "empty: holds no stage of a run"),
        ([str(run), "--out", "/proc/none/page.html"], "cannot be written"),
        ([], "usage: python -m trainer.report RUN"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_it_needs_no_torch(run: Path, tmp_path: Path) -> None:
    code = "import sys; from trainer.report.__main__ import main; main(); print({'torch', 'timm'} & {*sys.modules})"
    command = [sys.executable, "-c", code, str(run), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
