"""Convert my ViT: any timm Vision Transformer, on a folder of images, with a subfolder per class or without.

python -m examples.convert photos --teacher vit_small_patch14_dinov2.lvd142m --run runs/photos
"""

import argparse

import timm
import torch
import yaml

from trainer import convert

parser = argparse.ArgumentParser()
parser.add_argument("images", help="a folder of images")
parser.add_argument("--teacher", default="vit_small_patch14_dinov2.lvd142m", help="timm's name")
parser.add_argument("--weights", help="a file of its weights, in place of the hub's")
parser.add_argument("--run", default="runs/photos", help="the run folder")
parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="such as train.steps=500")
args = parser.parse_args()

settings = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in args.set)}
student = convert(args.teacher, args.images, args.run, weights=args.weights, **settings)

described = timm.data.resolve_model_data_config(student)
images = torch.rand(1, *described["input_size"])
with torch.no_grad():
    tokens = student.forward_features(images)
print(f"tokens {tuple(tokens.shape)}, classes {student.num_classes}, preprocessing {described}")
