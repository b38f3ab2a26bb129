"""The verdict: its figures by hand, ranks, what is refused, and what it leaves."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import Normalizer, StandardScaler
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

import data
import models
from data.write import write
from models import IGNORE
from models.embed import main as embed
from tests.conftest import ARCHITECTURE, Blobs, run_trainer
from trainer.config import UserError, parse
from trainer.evaluate.cost import measure
from trainer.evaluate.embed import of_beton
from trainer.evaluate.masks import miou, resampled
from trainer.evaluate.neighbours import nearest, vote
from trainer.evaluate.plan import make_plan
from trainer.evaluate.report import table
from trainer.main import main
from trainer.output.folder import StageFolder
from trainer.setup.check import check as check_job
from trainer.stages.segmentation.views import Views

NAME = "vit_tiny_patch16_224"
GIVEN = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "box"}
QUICK = ("--probe.batch_size", "8", "--probe.solver", "ridge", "--evaluate.neighbours", "5")


class Bare:
    """Images without labels."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": Blobs(9, 3)[index][0]}


def export(folder: Path, model: torch.nn.Module, linear: list[int], **more) -> Path:
    """An export of a model of the small teacher's kind, with its lineage."""
    sha256 = models.fingerprint(load_file(folder / "teacher.safetensors"))
    operator = {"operator": "elu1", "additions": [], "linear_blocks": linear}
    lineage = {"teacher": {"name": NAME, "kwargs": ARCHITECTURE, "sha256": sha256}, "stages": ["1"], "data": []}
    kwargs = ARCHITECTURE | {"img_size": 32, "num_classes": models.backbone_of(model).num_classes}
    config = {"backbone": {"name": NAME, "kwargs": kwargs}, "attention": operator | {"kwargs": {}}, "input": GIVEN}
    config["lineage"] = lineage | operator | {"operator_kwargs": {}, "parent": None}
    path = folder / more.pop("name")
    models.save(path, model.state_dict(), config | more)
    return path


@pytest.fixture(scope="module")
def folder(small: Path) -> Path:
    """The small folder with exports: a student, a softmax model that wants other colours, and two that segment."""
    if (small / "student").exists():
        return small
    teacher = models.build_backbone(NAME, ARCHITECTURE, small / "teacher.safetensors", image_size=32)
    export(small, models.linearize(teacher), [0, 1], name="student")
    export(small, teacher, [], name="other", input=GIVEN | {"mean": [0.4, 0.5, 0.6]})
    for name, linear in (("seg_student", [0, 1]), ("seg_softmax", [])):
        torch.manual_seed(len(linear))
        vit = models.linearize(teacher, keep_softmax={0, 1} - set(linear))
        head = {"head": "linear", "num_classes": 3, "kwargs": {}}
        model = models.Segmenter(vit, models.build_head("linear", 32, 3))
        export(small, model, linear, name=name, segmentation=head)
    save_file({name: torch.randn(4) for name in "dcba"}, small / "texts.safetensors")
    save_file({"embeddings": torch.randn(4, 7)}, small / "wide.safetensors")
    save_file({"embeddings": torch.randn(3, 4)}, small / "few.safetensors")
    save_file({name: torch.randn(4) for name in "abc"}, small / "no_d.safetensors")
    write(Bare(), small / "bare.beton", raw_share=1.0, progress=False)
    return small


def argv(folder: Path, run: Path, *options: str) -> list[str]:
    return ["--config", str(folder / "recipe.yaml"), "--stage", "evaluate", "--run", str(run), *QUICK, *options]


def everything(folder: Path) -> list[str]:
    texts = ["--evaluate.class_embeddings", str(folder / "texts.safetensors"), "--evaluate.pooling", "[pooled,both]"]
    texts += ["--student.parent", str(folder / "student"), "--evaluate.beside", f"other={folder / 'other'}"]
    return [*QUICK, *texts, "--evaluate.measures", "[knn,probe,head,zero_shot,agreement]"]


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """results.json of all that needs labels, on one rank."""
    done = run_trainer(folder, tmp_path_factory.mktemp("evaluate"), "evaluate", *everything(folder))
    assert done.code == 0, done.err
    assert not (done.folder / "features").exists()
    return json.loads((done.folder / "results.json").read_text())


@pytest.fixture(scope="module")
@torch.no_grad()
def by_hand(folder: Path) -> dict:
    """What the models give of the images, plainly: {split: {"label", model: (tokens, pooled, logits)}}."""
    teacher = models.build_backbone(NAME, ARCHITECTURE, folder / "teacher.safetensors", image_size=32)
    vits = {"teacher": teacher, "student": models.load(folder / "student"), "other": models.load(folder / "other")}
    found = {}
    for split in ("train", "val"):
        found[split] = {name: [] for name in ("label", *vits)}
        for batch in data.eval_loader(folder / f"{split}.beton", image_size=32, batch_size=22, workers=1,
                                      mean=[0] * 3, std=[1] * 3).epoch():  # fmt: skip
            found[split]["label"].append(batch["label"][batch["valid"]])
            for name, vit in vits.items():
                of = vit.pretrained_cfg
                mean, std = (torch.tensor(of[key]).view(3, 1, 1) for key in ("mean", "std"))
                tokens = vit.forward_features((batch["image"][batch["valid"]] - mean) / std)
                found[split][name].append((tokens, tokens[:, 0], vit.forward_head(tokens)))
        for name in vits:
            found[split][name] = [torch.cat(x) for x in zip(*found[split][name], strict=True)]
        found[split]["label"] = torch.cat(found[split]["label"])
    return found


def value(results: dict, measure: str, model: str, **more: str) -> float:
    (row,) = [row for row in results["results"] if (row["measure"], row["model"]) == (measure, model)
              and all(row[key] == v for key, v in more.items())]  # fmt: skip
    return row["value"]


@pytest.mark.parametrize("model", ["teacher", "student", "other"])
def test_the_figures_by_hand(folder: Path, alone: dict, by_hand: dict, model: str) -> None:
    train, val = by_hand["train"], by_hand["val"]
    label, pooled = val["label"].numpy(), val[model][1]
    cosines, at = (
        NearestNeighbors(n_neighbors=5, metric="cosine").fit(train[model][1].numpy()).kneighbors(pooled.numpy())
    )
    votes = np.zeros((len(label), 4))
    for i, (near, rows) in enumerate(zip(1 - cosines, at, strict=True)):
        np.add.at(votes[i], train["label"].numpy()[rows], np.exp(near / 0.07))
    wanted = 100 * (votes.argmax(1) == label).mean()
    assert value(alone, "k-NN, k = 5", model, pooling="pooled") == pytest.approx(wanted)
    assert value(alone, "own head, top-1", model) == pytest.approx(
        100 * (val[model][2].argmax(1) == val["label"]).float().mean().item()
    )
    texts = load_file(folder / "texts.safetensors")
    scores = F.normalize(val[model][2], dim=-1) @ F.normalize(torch.stack([texts[c] for c in "abcd"]), dim=-1).mT
    assert value(alone, "zero-shot, top-1", model) == pytest.approx(
        100 * (scores.argmax(1) == val["label"]).float().mean().item()
    )
    if model != "teacher":
        cosine = F.cosine_similarity(val[model][0], val["teacher"][0], dim=-1)
        assert value(alone, "cosine to teacher", model, of="patches") == pytest.approx(
            cosine[:, 1:].mean().item(), abs=1e-5
        )
        assert value(alone, "cosine to teacher", model, of="prefix") == pytest.approx(
            cosine[:, 0].mean().item(), abs=1e-5
        )
        same = val[model][2].argmax(1) == val["teacher"][2].argmax(1)
        assert value(alone, "same class as teacher", model, of="head") == pytest.approx(
            100 * same.float().mean().item()
        )
        sets = []
        for x in (pooled.numpy(), val["teacher"][1].numpy()):
            at = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x).kneighbors(x, return_distance=False)
            sets.append([set(row) - {i} for i, row in enumerate(at)])
        common = np.mean([len(a & b) / 5 for a, b in zip(*sets, strict=True)])
        assert value(alone, "common neighbours, k = 5", model) == pytest.approx(100 * common)


def test_the_probe_is_scikit_learns_on_both_tokens(folder: Path, alone: dict, by_hand: dict) -> None:
    """The best penalty on the validation images is not known here: one of them it must be."""
    x, y = {}, {split: of["label"] for split, of in by_hand.items()}
    for split, of in by_hand.items():
        tokens = of["student"][0]
        x[split] = torch.cat([tokens[:, 0], tokens.mean(1)], 1).numpy()
    settings = parse(argv(folder, folder / "none", *everything(folder)))
    plan = make_plan(settings, StageFolder(settings))
    fit = plan.store.splits["fit"].indices
    normal = Normalizer().fit(x["train"])
    scaler = StandardScaler().fit(normal.transform(x["train"][fit]))
    x = {split: scaler.transform(normal.transform(of)) for split, of in x.items()}
    hot = F.one_hot(y["train"], 4).numpy()[fit]
    tops = [100 * (Ridge(alpha=1 / c).fit(x["train"][fit], hot).predict(x["val"]).argmax(1) == y["val"].numpy()).mean()
            for c in (0.01, 0.1, 1.0)]  # fmt: skip
    assert any(value(alone, "probe, ridge", "student", pooling="both") == pytest.approx(top) for top in tops)


def test_two_ranks_say_the_same(folder: Path, alone: dict, tmp_path: Path) -> None:
    done = run_trainer(folder, tmp_path, "evaluate", *everything(folder), ranks=2)
    assert done.code == 0, done.err
    theirs = json.loads((tmp_path / "evaluate/results.json").read_text())
    assert [row | {"value": 0, "low": 0, "high": 0} for row in theirs["results"]] == [
        row | {"value": 0, "low": 0, "high": 0} for row in alone["results"]
    ]
    for mine, other in zip(theirs["results"], alone["results"], strict=True):
        assert mine["value"] == pytest.approx(other["value"], abs=1e-4)
    assert "student - teacher" in done.out and "k-NN, k = 5 (pooled), %" in done.out


def test_images_without_labels_and_another_evaluation(folder: Path, tmp_path: Path, capsys) -> None:
    """The copied weights beside the teacher; then another measure in the same run folder, and the same again."""
    given = [*QUICK, "--student.parent", "none", "--data.val", str(folder / "bare.beton")]
    done = run_trainer(folder, tmp_path, "evaluate", *given, "--evaluate.measures", "[agreement]")
    assert done.code == 0, done.err
    first = (tmp_path / "evaluate/results.json").read_text()
    names = {row["measure"] for row in json.loads(first)["results"]}
    assert names == {"cosine to teacher", "same class as teacher", "common neighbours, k = 5"}
    sizes = ["--evaluate.sizes", "[32,48]", "--evaluate.measures", "[speed]", "--evaluate.seconds", "0.01"]
    assert run_trainer(folder, tmp_path, "evaluate", *given, *sizes).code == 0
    assert (tmp_path / "evaluate/results-1.json").read_text() == first
    second = (tmp_path / "evaluate/results.json").read_text()
    rows = json.loads(second)["results"]
    assert {(row["model"], row["size"]) for row in rows} == {(m, s) for m in ("teacher", "student") for s in (32, 48)}
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    assert main(argv(folder, tmp_path, *given, *sizes)) == 0
    said = capsys.readouterr().out
    assert "the evaluation is complete" in said and "throughput (48 pixels, batch 8)" in said
    assert (tmp_path / "evaluate/results.json").read_text() == second
    assert not (tmp_path / "evaluate/results-2.json").exists()


def masks_in(folder: Path, split: str) -> data.Loader:
    return data.original_loader(folder / f"{split}.beton", batch_size=1, workers=1, mean=[0.5] * 3, std=[0.5] * 3)


@torch.no_grad()
def patch_probe_by_hand(folder: Path, val: data.Loader, vit: torch.nn.Module) -> float:
    """Percent."""
    x, y = {"masked": [], "masked_val": []}, []
    masks = []
    for split, kept in x.items():
        for batch in (val if split == "masked_val" else masks_in(folder, split)).epoch():
            image = F.interpolate(batch["image"], (32, 32), mode="bilinear", antialias=True)
            kept.append(vit.forward_features(image)[0, 1:].numpy())
            if split == "masked":  # 32 x 32 pixels, 4 x 4 patches
                for patch in batch["mask"][0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).flatten(0, 1):
                    y.append(torch.bincount(patch.long(), minlength=256).argmax().item())
            else:
                masks.append(batch["mask"])
    known = np.array(y) != IGNORE
    fit = np.concatenate(x["masked"])[known]
    normal, scaler = Normalizer(), StandardScaler().fit(Normalizer().fit_transform(fit))
    hot = F.one_hot(torch.tensor(y)[torch.from_numpy(known)], 3).numpy()
    probe = Ridge(alpha=0.01 * len(fit)).fit(scaler.transform(normal.transform(fit)), hot)
    wanted = MulticlassJaccardIndex(3, ignore_index=IGNORE)
    for tokens, mask in zip(x["masked_val"], masks, strict=True):
        scores = torch.tensor(probe.predict(scaler.transform(normal.transform(tokens)))).float().T.reshape(1, 3, 4, 4)
        wanted.update(F.interpolate(scores, mask.shape[1:], mode="bilinear").argmax(1), mask.long())
    return 100 * wanted.compute().item()


def test_masks(folder: Path, tmp_path: Path) -> None:
    more = ["--student.parent", str(folder / "seg_student"), "--evaluate.beside", f"softmax={folder / 'seg_softmax'}"]
    more += ["--data.train", str(folder / "masked.beton"), "--evaluate.measures", "[segmentation,mask_probe]"]
    more += [*QUICK, "--data.val", str(folder / "masked_val.beton")]
    done = run_trainer(folder, tmp_path, "evaluate", *more, ranks=2)
    assert done.code == 0, done.err
    every = json.loads((tmp_path / "evaluate/results.json").read_text())["results"]
    rows = {row["model"]: row for row in every if row["measure"] == "mIoU"}
    probed = {row["model"]: row["value"] for row in every if row["measure"] == "mIoU of a patch probe"}
    assert set(rows) == {"student", "softmax"} and set(probed) == {"teacher", "student", "softmax"}
    loader = masks_in(folder, "masked_val")
    by_hand = patch_probe_by_hand(folder, loader, models.load(folder / "seg_student").backbone)
    assert probed["student"] == pytest.approx(by_hand, abs=0.1)  # a pixel of equal scores may fall otherwise
    for name in ("student", "softmax"):
        wanted = MulticlassJaccardIndex(3, ignore_index=IGNORE)
        model = models.load(folder / f"seg_{name}")
        settings = parse(argv(folder, tmp_path))
        views = Views.of(settings, 32, 8)
        with torch.no_grad():
            for batch in loader.epoch():
                wanted.update(views.probabilities(model, batch["image"]).argmax(1), batch["mask"].long())
        assert rows[name]["value"] == pytest.approx(100 * wanted.compute().item(), abs=1e-3)
        assert rows[name]["low"] <= rows[name]["value"] <= rows[name]["high"]
    assert rows["student"]["to"] == "softmax" and rows["student"]["half"] > 0
    assert rows["student"]["difference"] == pytest.approx(rows["student"]["value"] - rows["softmax"]["value"])


# options -> what the one line says
MISTAKES = {
    ("--data.val", "none", "--evaluate.measures", "[probe]"): "probe: there are no images to judge on",
    ("--data.val", "{}/bare.beton", "--evaluate.measures", "[probe]"): "bare.beton has no labels",
    ("--data.train", "{}/bare.beton", "--evaluate.measures", "[knn]"): "data.train {}/bare.beton has no labels",
    ("--data.train", "none", "--evaluate.measures", "[knn]"): "no images to fit on",
    ("--evaluate.measures", "[zero_shot]"): "needs a text embedding per class",
    ("--evaluate.measures", "[segmentation]"): "val.beton has no masks",
    ("--evaluate.measures", "[mask_probe]"): "data.train {}/train.beton has no masks",
    ("--evaluate.class_embeddings", "{}/wide.safetensors"): "have 7 dimensions, the models give teacher 4",
    ("--evaluate.class_embeddings", "{}/few.safetensors"): "has 3 classes, data.val 4",
    ("--evaluate.class_embeddings", "{}/no_d.safetensors"): "has none for 'd'",
    ("--evaluate.class_embeddings", "{}/none.safetensors"): "none.safetensors: no such file",
    ("--evaluate.class_embeddings", "{}/texts.safetensors", "--evaluate.measures", "[head]"): "is for zero_shot",
    ("--evaluate.models", "[student]"): "has no export; give one with --student.parent",
    ("--evaluate.models", "[teacher]", "--evaluate.measures", "[agreement]"): "needs the teacher beside another model",
    ("--evaluate.models", "[teacher]", "--evaluate.pooling", "[middle]"): "evaluate.pooling",
    ("--student.parent", "{}/nothing"): "{}/nothing: no folder of an export",
    ("--student.parent", "{}/student", "--teacher.kwargs.depth", "3"): "missing",
    ("--evaluate.beside", "teacher={}/other"): "the name is taken",
    ("--evaluate.beside", "a=vit_none"): "vit_none: no folder of an export, and no name of timm's",
    ("--evaluate.sizes", "[30]", "--evaluate.measures", "[speed]"): "evaluate.sizes 30: not a multiple",
    ("--data.val", "{}/masked_val.beton", "--evaluate.measures", "[segmentation]"): "no model segments",
}  # fmt: skip


@pytest.mark.parametrize("options", MISTAKES, ids=lambda options: " ".join(options).replace("{}/", ""))
def test_a_mistake_is_one_line(folder: Path, tmp_path: Path, options: tuple[str, ...], capsys) -> None:
    with pytest.raises((UserError, ValueError, OSError)) as error:
        settings = parse(argv(folder, tmp_path, *(option.format(folder) for option in options)))
        make_plan(settings, StageFolder(settings))
    assert MISTAKES[options].format(folder) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_export_alone_is_found_with_its_run(folder: Path, tmp_path: Path, capsys) -> None:
    """Its run's recipe where there is one; else its own settings, without the teacher when that cannot be had."""
    shutil.copytree(folder / "student", tmp_path / "run/stage2/export")
    alone = ["--stage", "evaluate", "--student.parent", str(tmp_path / "run/stage2/export")]
    assert (parse(alone).run, Path(parse(alone).source).name) == ("runs/own", "own.yaml")
    shutil.copy(folder / "recipe.yaml", tmp_path / "run/recipe.yaml")
    assert (parse(alone).run, parse(alone).data.train) == (str(tmp_path / "run"), str(folder / "train.beton"))
    (tmp_path / "run/recipe.yaml").unlink()
    settings = parse([*alone, "--data.val", str(folder / "bare.beton"), "--run", str(tmp_path / "other")])
    plan = make_plan(settings, StageFolder(settings))
    assert list(plan.subjects) == ["student"] and plan.measures == ["speed"] and list(plan.given["mean"]) == [0.5] * 3
    assert any("without the teacher vit_tiny_patch16_224" in note for note in plan.notes)


def test_a_cluster_checks_it_before_it_waits(folder: Path, tmp_path: Path) -> None:
    check_job(parse(argv(folder, tmp_path, "--student.parent", str(folder / "student"))), [1, 2])
    alone = ["--stage", "evaluate", "--student.parent", NAME, "--run", str(tmp_path)]
    check_job(parse(alone), [1])
    with pytest.raises(UserError, match=r"bare\.beton has no labels"):
        check_job(parse([*alone, "--data.val", str(folder / "bare.beton"), "--evaluate.measures", "[head]"]), [1])


def test_features_of_a_beton_file(folder: Path, by_hand: dict, tmp_path: Path) -> None:
    out = tmp_path / "val.safetensors"
    assert embed([str(folder / "student"), str(folder / "val.beton"), str(out)], of_beton) == 0
    tensors = load_file(out)
    torch.testing.assert_close(tensors["pooled"], by_hand["val"]["student"][1], atol=1e-5, rtol=1e-5)
    assert list(tensors["mean_patch"].shape) == [22, 32]
    assert embed([str(folder / "student"), str(folder / "none.beton"), str(out)], of_beton) == 2


def test_speed_counts_what_torch_computes() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 10))
    found = measure(model, 4, 2, 0.01)
    assert found["gflops"] == pytest.approx(2 * 48 * 10 / 1e9) and found["parameters"] == 490
    assert found["memory_mib"] == pytest.approx(2 * 10 * 4 / 2**20)
    assert found["latency_ms"] > 0 and found["images_per_second_low"] <= found["images_per_second"]


def test_flops_of_softmax_attention_by_hand() -> None:
    vit = models.build_backbone(NAME, ARCHITECTURE | {"depth": 1}, pretrained=False, image_size=32)
    for size, patches in ((32, 16), (64, 64)):
        n = patches + 1
        per_token = 2 * 32 * 3 * 32 + 2 * 32 * 32 + 2 * 2 * 32 * 64 + 2 * 2 * n * 32  # q, k, v; output; MLP; attention
        wanted = 2 * patches * 3 * 64 * 32 + n * per_token + 2 * 32 * 4  # with the patches and the head
        assert measure(vit, size, 2, 0.001)["gflops"] == pytest.approx(wanted / 1e9)


def test_nearest_over_blocks_and_votes() -> None:
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 6), torch.randn(4, 6)
    cosines, at = nearest(queries, bank.split(7), 3)
    every = F.normalize(queries, dim=-1) @ F.normalize(bank, dim=-1).mT
    assert torch.equal(at, every.topk(3).indices)
    torch.testing.assert_close(cosines, every.topk(3).values)
    assert vote(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[2, 1, 1]]), 3).item() == 2  # near votes weigh more
    assert vote(torch.tensor([[0.9, 0.899, 0.898]]), torch.tensor([[2, 1, 1]]), 3).item() == 1


def test_intervals_of_mean_intersection_over_union() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 50, (40, 3))
    hits = (truth * rng.uniform(0.5, 1, truth.shape)).astype(int)
    counts = np.stack([hits, truth, truth], 1)
    values = resampled(counts, 0)
    assert np.quantile(values, 0.025) < miou(counts) < np.quantile(values, 0.975)
    assert np.array_equal(values, resampled(counts, 0)) and not np.array_equal(values, resampled(counts, 1))
    counts[:, :, 2] = 0  # a class that nobody has counts nowhere
    assert miou(counts) == pytest.approx(miou(counts[:, :, :2]))


def test_the_table_has_a_line_per_figure() -> None:
    rows = [
        {"measure": "a", "model": m, "value": v, "low": v - 1, "high": v + 1, "unit": "%"}
        for m, v in (("x", 50.0), ("y", 40.0))
    ]
    rows[1] |= {"to": "x", "difference": -10.0, "half": 2.0}
    said = table({"models": {"x": {}, "y": {}}, "results": rows})
    assert said.splitlines()[1].split("  ")[0] == "a, %" and said.splitlines()[1].endswith("-10.0 +- 2.0")
