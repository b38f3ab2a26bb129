"""Segmentation: convert a ViT, fine-tune it on images with masks, and colour a photo.

python -m examples.segmentation masked.beton photo.jpg --teacher vit_small_patch14_dinov2.lvd142m --run runs/masks
"""

import argparse

import numpy as np
import timm
import torch
import yaml
from PIL import Image

from trainer import convert

parser = argparse.ArgumentParser()
parser.add_argument("images", help="ADE20K, Cityscapes or VOC as distributed, or a file with masks")
parser.add_argument("photo", help="an image to colour")
parser.add_argument("--teacher", default="vit_small_patch14_dinov2.lvd142m", help="timm's name")
parser.add_argument("--weights", help="a file of its weights, in place of the hub's")
parser.add_argument("--run", default="runs/masks", help="the run folder")
parser.add_argument("--out", default="masks.png")
parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="such as train.steps=500")
args = parser.parse_args()

settings = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in args.set)}
model = convert(args.teacher, args.images, args.run, weights=args.weights, task="segmentation", **settings)

described = timm.data.resolve_model_data_config(model)
photo = Image.open(args.photo).convert("RGB")
pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
mean, std = (torch.tensor(described[name])[:, None, None] for name in ("mean", "std"))
with torch.no_grad():
    labels = model(((pixels - mean) / std)[None]).argmax(1)[0].numpy()
Image.fromarray(np.array(model.palette, dtype=np.uint8)[labels]).save(args.out)
seen = {model.classes[label]: f"{(labels == label).mean():.1%}" for label in np.unique(labels)}
print(f"{args.out}: {seen}")
