"""Networks: softmax ViTs, their linear-attention counterparts, and what reads them. Knows nothing of training."""

from .backbones import architecture, build_backbone, check_image_size, fingerprint, read_weights
from .export import load, read_config, save
from .feature_maps import FEATURE_MAPS
from .linear_attention import LinearAttention, linear_attention
from .linearize import check_linearizable, linear_blocks, linearize
from .taps import BLOCK_MODULES, tap_names, taps

__all__ = [
    "BLOCK_MODULES",
    "FEATURE_MAPS",
    "LinearAttention",
    "architecture",
    "build_backbone",
    "check_image_size",
    "check_linearizable",
    "fingerprint",
    "linear_attention",
    "linear_blocks",
    "linearize",
    "load",
    "read_config",
    "read_weights",
    "save",
    "tap_names",
    "taps",
]
