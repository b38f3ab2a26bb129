"""Quick probes while stage 2 trains, every `probe.every` steps: the student's modules beside the teacher's."""

import numpy as np
import torch
from torch import Tensor

import data
from models import tap_names
from trainer.config import Settings, UserError
from trainer.engine.engine import DeepSpeedEngine
from trainer.probe.features import tapped
from trainer.probe.solve import ridge, statistics
from trainer.ranks.world import World, dist
from trainer.setup.build import Job

IMAGES = 2048  # of the training images at most, drawn by lot: half to fit on, half to test on
SHRINKAGE = 0.01  # ridge's alpha, as a share of the images that are fitted
MODULES = ["blocks.*.act", "blocks.*.rc2"]


class QuickProbe:
    """Ridge probes on the mean tokens of the student beside the teacher, on centre views of a few training images.

    It is called at each evaluation. Without `probe.every`, or in a stage without quick probes, it does nothing.
    """

    def __init__(self, settings: Settings, job: Job, me: World, engine: DeepSpeedEngine) -> None:
        """Raises UserError where there is no evaluation, the training images have no labels, or a module is missing."""
        self.every = settings.probe.every if job.stage.quick_probes else 0
        if not self.every:
            return
        if job.val is None:
            raise UserError(f"probe.every {self.every}: quick probes are part of an evaluation; give --data.val")
        if not job.train.has_labels:
            raise UserError(
                f"probe.every {settings.probe.every}: data.train {job.train.path} has no labels to probe for"
            )
        self.me, self.job, self.engine, self.classes = me, job, engine, job.train.max_label + 1
        try:
            self.names = tap_names(job.stage.student, settings.probe.modules or MODULES)
        except ValueError as error:
            raise UserError(str(error)) from error
        drawn = np.argsort(data.lots(job.train.num_samples, settings.train.seed), kind="stable")[:IMAGES]
        self.fitted = torch.from_numpy(drawn[: len(drawn) // 2]).to(me.device)
        given = job.export["input"]
        self.loader = data.eval_loader(
            job.train.path, indices=np.sort(drawn), batch_size=settings.probe.batch_size, rank=me.rank,
            world_size=me.size, device=me.device, dtype=torch.bfloat16 if settings.train.bf16 else torch.float32,
            workers=settings.data.workers, **{key: given[key] for key in ("image_size", "mean", "std", "crop_pct")},
        )  # fmt: skip

    def __call__(self, step: int) -> dict[str, float]:
        """Top-1 in percent, {"student.blocks.0.act": ..., ...}, or {} between two probes; a collective."""
        is_probed = self.every and (step % self.every == 0 or step == self.job.steps)
        return self._top1() if is_probed else {}

    def _top1(self) -> dict[str, float]:
        stage, rows = self.job.stage, []
        self.engine.eval()
        # The call of the engine gathers the weights that ZeRO 3 spreads over the ranks.
        with torch.no_grad(), tapped(stage.student, self.names, "mean") as student, tapped(
            stage.teacher, self.names, "mean"
        ) as teacher:  # fmt: skip
            for batch in self.loader.epoch():
                self.engine(batch)
                read = {(model, tap): x for model, of in (("student", student), ("teacher", teacher))
                        for (tap, _), x in of().items()}  # fmt: skip
                rows.append(read | {key: batch[key] for key in ("label", "index", "valid")})
        self.engine.train()
        columns = {key: self._everywhere(torch.cat([row[key] for row in rows])) for key in rows[0]}
        label, index, valid = (columns.pop(key) for key in ("label", "index", "valid"))
        fit = valid & torch.isin(index, self.fitted)
        tested = valid & ~fit
        top1 = torch.zeros(len(columns), dtype=torch.float64, device=self.me.device)
        for i, x in enumerate(columns.values()):
            if i % self.me.size == self.me.rank:
                stats = statistics(lambda x=x: [(x[None, fit], label[fit])], self.classes)
                probes = ridge(stats, [1 / (SHRINKAGE * stats.count)])
                top1[i] = 100 * (probes.predict(stats.standardise(x[None, tested])) == label[tested]).double().mean()
        dist.all_reduce(top1)
        return {".".join(key): value for key, value in zip(columns, top1.tolist(), strict=True)}

    def _everywhere(self, mine: Tensor) -> Tensor:
        """All ranks' rows on each rank."""
        all_ranks = [torch.empty_like(mine) for _ in range(self.me.size)]
        dist.all_gather(all_ranks, mine.contiguous())
        return torch.cat(all_ranks)
