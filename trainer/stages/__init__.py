"""The table of stages: what `--stage` takes, and what runs it.

A stage is a file, or a folder with `stage.py` and, where it has settings of its own, `settings.py`. The table holds
names, since to import a stage takes seconds, and imports nothing.
"""

STAGES: dict[str, str | dict[str, str]] = {
    "1": "trainer.stages.attention_alignment.stage:AttentionAlignment",
    "2": "trainer.stages.feature_alignment.stage:FeatureAlignment",
    "3": {  # by --task
        "classification": "trainer.stages.finetune.stage:Finetune",
        "segmentation": "trainer.stages.segmentation.stage:Segmentation",
    },
    "probe": "trainer.probe.stage",
    "evaluate": "trainer.evaluate.stage",
}
