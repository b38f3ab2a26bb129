"""Drop the student into a timm pipeline: its features as they are, and a new head trained on a folder of images.

python -m examples.pipeline runs/photos/stage2/export photos
"""

import argparse

import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import models  # noqa: F401  in an environment with the wheel: import unsoftmax

parser = argparse.ArgumentParser()
parser.add_argument("export", help="the folder of an export")
parser.add_argument("images", help="a folder of images, a subfolder per class")
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()

student = timm.create_model(f"local-dir:{args.export}", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
dataset = timm.data.create_dataset("", root=args.images, transform=transform)
loader = DataLoader(dataset, batch_size=16, shuffle=True)

maps = student.forward_intermediates(next(iter(loader))[0], indices=1, intermediates_only=True)
print(f"feature maps of the last block: {tuple(maps[0].shape)}")

student.reset_classifier(len(dataset.reader.class_to_idx))
optimizer = timm.optim.create_optimizer_v2(student.get_classifier(), opt="adamw", lr=1e-2)
for epoch in range(args.epochs):
    for images, labels in loader:
        with torch.no_grad():
            features = student.forward_head(student.forward_features(images), pre_logits=True)
        loss = F.cross_entropy(student.get_classifier()(features), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
