"""A real foundation model, converted: `make bench-foundation ARGS="--teacher FILE --photos FOLDER --eval FOLDER"`.

Stages 1 and 2 of each student on the photographs, on equal budgets; then teacher and students are judged on other
images, frozen: cosine of all final tokens; ridge and k-NN on class token and mean patch; a linear segmentation head.
At the training size and at twice that. Of several options for a stage, parted by `|`, all are run and the one whose
student comes nearest to the teacher on held-out images (caltech101's) is kept: each student at its best. `--eval` holds
caltech101/ and imagewoof/, with train/ and val/, a folder per class; and camvid/ with images/, masks/ (train/ and val/
in both) and classes.csv. What is done is only read, so the same command goes on where it was interrupted.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

import data
import models
from benchmarks.common import ROOT, markdown

LABELLED = ("caltech101", "imagewoof")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEIGHBOURS = 5  # of 12 to 30 images per class
PENALTIES = [10.0**power for power in range(-1, 6)]  # leave-one-out on the training images chooses
RECOMMENDED = "--student.operator pooled"
STAGE2 = " | ".join(f"--train.lr {rate} --stage2.standardise true --stage2.blocks auto:3" for rate in (4e-6, 1e-5))
# Name, options of both stages, of stage 1, of stage 2.
STUDENTS = [
    ("vanilla", "--student.operator elu1", "--train.lr 3e-3", "--train.lr 2e-5"),
    ("recommended", RECOMMENDED, "--train.lr 1e-4", STAGE2),
    ("hybrid", f"{RECOMMENDED} --student.keep_softmax auto:3", "--train.lr 1e-4", STAGE2),
]  # fmt: skip


def write(source: Path, out: Path, *options: str) -> Path:
    """A .beton file of a folder, unless it is there."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "data.write", str(source), str(out), *options]
        subprocess.run(command, cwd=ROOT, check=True)
    return out


def run(folder: Path, stage: int, options: list[str]) -> list[dict[str, Any]]:
    """One stage in the run folder `folder`; done before with the same options, it is only read. Its val lines."""
    kept, done = folder / f"stage{stage}.json", folder / f"stage{stage}/export/config.json"
    if not (done.is_file() and kept.is_file() and json.loads(kept.read_text()) == options):
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(options))
        command = [sys.executable, "trainer/run.py", "--stage", str(stage), "--run", str(folder), *options]
        print(f"{folder.name}: stage {stage} ...", flush=True)
        with (folder / f"stage{stage}.log").open("a") as log:
            # timm's own softmax attention: on a CPU, at these lengths, quicker in backward than torch's fused one.
            env = os.environ | ({} if DEVICE.type == "cuda" else {"TIMM_FUSED_ATTN": "0"})
            ended = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        if ended.returncode:
            raise SystemExit(f"{folder.name}: stage {stage} ended with status {ended.returncode}, see {log.name}")
    lines = map(json.loads, (folder / f"stage{stage}/metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == "val"]


class Search:
    """Runs of stages 1 and 2, `jobs` at a time; what each came to."""

    def __init__(self, out: Path, jobs: int, options: list[str], epochs: tuple[float, float]) -> None:
        """`options`: of every run."""
        self.out, self.options, self.epochs = out, options, epochs
        self.pool = ThreadPoolExecutor(jobs)
        self.rows: list[list[str]] = []

    def best(self, stage: int, wanted: dict[str, list[str]]) -> dict[str, Path]:
        """For each student, the export of `stage` nearest to the teacher, of all that its options lead to."""
        running = [
            (name, options, folder, self.pool.submit(run, folder, stage, given))
            for name, alternatives in wanted.items()
            for options in alternatives
            for given in [[*self.options, "--train.epochs", str(self.epochs[stage - 1]), *shlex.split(options)]]
            for folder in [self.out / f"{name}-{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]}"]
        ]
        nearest: dict[str, tuple[float, Path]] = {}
        for name, options, folder, lines in running:
            cosines = {line["step"]: line["feature_cosine"] for line in lines.result()}
            before, cosine = (f"{cosines[0]:.4f}" if 0 in cosines else ""), cosines[max(cosines)]
            of_stage = options.partition(" --student.parent")[0]
            self.rows.append([name, str(stage), f"`{of_stage}`", before, f"{cosine:.4f}"])
            print(f"{name}: stage {stage}, cosine {before} -> {cosine:.4f}, {of_stage}", flush=True)
            nearest[name] = max(nearest.get(name, (-1.0, folder)), (cosine, folder / f"stage{stage}/export"))
        return {name: export for name, (_, export) in nearest.items()}


@torch.no_grad()
def read(vit: models.ViT, teacher: models.ViT | None, file: Path, given: dict[str, Any]) -> tuple:
    """Class token and mean patch of each image [M, 2 D], labels [M], and the mean cosine of all tokens, or None.

    Args:
        given: keywords of the loader.
    """
    vectors, labels, cosines = [], [], []
    prefix = vit.num_prefix_tokens
    for batch in data.eval_loader(file, device=DEVICE, **given).epoch():
        image = batch["image"][batch["valid"]]
        tokens = vit.forward_features(image)
        parts = [tokens[:, prefix:].mean(1)] + ([tokens[:, 0]] if prefix else [])
        vectors.append(torch.cat(parts, 1).cpu())
        labels.append(batch["label"][batch["valid"]].cpu())
        if teacher is not None:
            cosines.append(F.cosine_similarity(tokens, teacher.forward_features(image), dim=-1).mean(1).cpu())
    cosine = torch.cat(cosines).mean().item() if cosines else None
    return torch.cat(vectors).numpy(), torch.cat(labels).numpy(), cosine


def judge(vit: models.ViT, teacher: models.ViT, files: dict[str, Path], given: dict[str, Any]) -> dict[str, float]:
    """The figures of a frozen model, in percent, and its cosine to the teacher."""
    found = {}
    for name in LABELLED:
        x, y, _ = read(vit, None, files[f"{name}-train"], given)
        test_x, test_y, cosine = read(vit, teacher, files[f"{name}-val"], given)
        found |= {"cosine": cosine} if name == LABELLED[0] else {}
        ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
        neighbours = KNeighborsClassifier(NEIGHBOURS, weights="distance", metric="cosine")
        for kind, probe in (("ridge", ridge), ("k-NN", neighbours)):
            found[f"{name} {kind}"] = 100 * probe.fit(x, y).score(test_x, test_y)
    return found


def main() -> None:
    """Run everything that is not done yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="the weights of --name")
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs, without labels")
    parser.add_argument("--eval", type=Path, required=True, help="the folder to judge on")
    parser.add_argument("--name", default="vit_small_patch14_dinov2.lvd142m", help="timm's name of the teacher")
    parser.add_argument("--epochs", type=float, nargs=2, default=(1, 1), metavar=("S1", "S2"))
    parser.add_argument("--size", type=int, default=224, help="pixels in training; judged at twice that too")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=20, help="steps of each stage")
    parser.add_argument("--head_epochs", type=float, default=10, help="of the segmentation head; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    what = "and options of both stages, of stage 1, of stage 2; alternatives parted by |; repeat it for each student"
    parser.add_argument("--student", nargs=4, action="append", metavar=("NAME", "BOTH", "S1", "S2"), help=what)
    parser.add_argument("--judge", type=int, nargs="*", help="pixels to judge at; by default --size and twice that")
    parser.add_argument("--bf16", default=str(DEVICE.type == "cuda").lower(), choices=("true", "false"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-foundation")
    args = parser.parse_args()
    out, name = args.out.resolve(), args.name
    weights, photos, images = (path.resolve() for path in (args.teacher, args.photos, args.eval))
    files = {"photos": write(photos, out / "data/photos.beton", "--unlabelled")}
    for part in LABELLED:
        for split in ("train", "val"):
            files[f"{part}-{split}"] = write(images / part / split, out / f"data/{part}-{split}.beton")
    camvid, classes = images / "camvid", out / "data/classes.csv"
    if args.head_epochs:
        lines = (camvid / "classes.csv").read_text().splitlines()  # what has no name is not learned
        classes.write_text("".join(re.sub("(?i),(unlabel|void).*", ",", line) + "\n" for line in lines))
        for split in ("train", "val"):
            options = ("--task", "segmentation", "--masks", str(camvid / "masks" / split))
            options += ("--classes", str(classes))
            files[f"camvid-{split}"] = write(camvid / "images" / split, out / f"data/camvid-{split}.beton", *options)

    common = ["--config", "own", "--teacher.name", name, "--teacher.weights", str(weights), "--tracking", "[]"]
    common += ["--student.additions", "[]"]
    common += ["--train.seed", str(args.seed), "--train.bf16", args.bf16, "--deepspeed", "ds_configs/zero1.json"]
    align = ["--data.train", str(files["photos"]), "--data.val", str(files["caltech101-val"])]
    align += ["--data.image_size", str(args.size), "--train.batch_size", str(args.batch)]
    align += ["--train.warmup_steps", str(args.warmup), "--train.log_every", "10"]
    align += ["--train.lr_new", "1", "--stage2.standardise", "false"]  # the recipe's own choices are a student's here
    align += ["--stage2.blocks", "[]"]
    search = Search(out, args.jobs, [*common, *align], args.epochs)
    students = {name: rest for name, *rest in args.student or STUDENTS}
    first = {
        name: [f"{both} {options.strip()}" for options in stage1.split("|")]
        for name, (both, stage1, _) in students.items()
    }
    aligned = search.best(1, first)
    second = {
        name: [f"{both} {options.strip()} --student.parent {aligned[name]}" for options in stage2.split("|")]
        for name, (both, _, stage2) in students.items()
    }
    done = search.best(2, second)
    print(markdown(["student", "stage", "options", "cosine on caltech101 before", "after"], search.rows))
    exports: dict[str, Path | None] = {"softmax teacher": None}
    exports |= {f"{name}, stage 1": export for name, export in aligned.items()} | done

    sizes = [args.size, 2 * args.size] if args.judge is None else args.judge
    segmented = {}
    for size in sizes if args.head_epochs else ():
        segment = ["--task", "segmentation", "--student.trainable", "head", "--data.image_size", str(size)]
        segment += ["--data.train", str(files["camvid-train"]), "--data.val", str(files["camvid-val"])]
        segment += ["--train.epochs", str(args.head_epochs), "--train.batch_size", "16", "--train.lr", "1e-3"]
        segment += ["--train.eval_first", "false", "--stage3.layer_decay", "null"]
        segment += ["--stage3.drop_path", "0", "--stage3.label_smoothing", "0"]
        for model in ("softmax teacher", *done):
            own = ["--student.attention", "softmax"]
            if model in done:
                own = [*shlex.split(students[model][0]), "--student.parent", str(done[model])]
            folder = out / f"camvid-{model.replace(' ', '-')}-{size}"
            segmented[size, model] = search.pool.submit(run, folder, 3, [*common, *segment, *own])

    table: dict[tuple[int, str], dict[str, float]] = {}
    for size in sizes:
        teacher = models.build_backbone(name, {}, weights, True, (size, size)).eval().to(DEVICE)
        config = teacher.pretrained_cfg
        given = {"image_size": size, "batch_size": args.batch, "mean": config["mean"], "std": config["std"]}
        for model, export in exports.items():
            file = out / f"judged-{model.replace(', ', '-').replace(' ', '-')}-{size}.json"
            mark = None if export is None else models.read_config(export).get("digest")
            kept = json.loads(file.read_text()) if file.is_file() else {}
            if kept.get("of") != mark or not kept:
                vit = teacher if export is None else models.load(export, size).to(DEVICE)
                print(f"{model}: judged at {size} pixels ...", flush=True)
                kept = {"of": mark, "figures": judge(vit, teacher, files, given)}
                file.write_text(json.dumps(kept))
            table[size, model] = dict(kept["figures"])
            if (size, model) in segmented:
                table[size, model]["CamVid mIoU"] = segmented[size, model].result()[-1]["miou"]
    if not table:
        return

    rows = []
    columns = list(table[sizes[0], "softmax teacher"])
    for (size, model), figures in table.items():
        cells = [
            f"{figures[key]:.3f}" if key == "cosine" else f"{figures[key]:.1f}" for key in columns if key in figures
        ]
        rows.append([model, str(size), *cells, *[""] * (len(columns) - len(cells))])
        if "vanilla" in done and model in done and model != "vanilla":
            closed = []
            for key in columns:
                best, low = table[size, "softmax teacher"][key], table[size, "vanilla"][key]
                closed.append(f"{(figures[key] - low) / (best - low):.0%}" if best > low else "")
            rows.append([f"of vanilla's loss, {model} recovers", str(size), *closed])
    print(markdown(["model", "pixels", *columns], rows))


if __name__ == "__main__":
    main()
