"""Networks: softmax ViTs, their linear-attention counterparts, and what reads them. Knows nothing of training."""

from .backbones import (
    architecture,
    build_backbone,
    check_image_size,
    fingerprint,
    match_dtypes,
    notes,
    take_any_size,
)
from .card import CARD, licence_of, model_card
from .checkpoints import check_finite, read_weights
from .export import load, read_config, save
from .heads import HEADS, IGNORE, Head, build_head
from .hub import push_to_hub, unsoftmax
from .linear_attention import LinearAttention
from .linearize import (
    ViT,
    borrowed_attention,
    check_linearizable,
    linear_blocks,
    linearize,
    note_image_size,
    rotary_embeddings,
)
from .operators import ADDITIONS, OPERATORS, linear_attention
from .segmenter import Segmenter, backbone_of
from .sources import folder_of, is_name, open_model
from .taps import BLOCK_MODULES, attention_entropy, tap_names, taps

__version__ = "0.1.0"

__all__ = [
    "ADDITIONS",
    "BLOCK_MODULES",
    "CARD",
    "HEADS",
    "IGNORE",
    "OPERATORS",
    "Head",
    "LinearAttention",
    "Segmenter",
    "ViT",
    "architecture",
    "attention_entropy",
    "backbone_of",
    "borrowed_attention",
    "build_backbone",
    "build_head",
    "check_finite",
    "check_image_size",
    "check_linearizable",
    "fingerprint",
    "folder_of",
    "is_name",
    "licence_of",
    "linear_attention",
    "linear_blocks",
    "linearize",
    "load",
    "match_dtypes",
    "model_card",
    "note_image_size",
    "notes",
    "open_model",
    "push_to_hub",
    "read_config",
    "read_weights",
    "rotary_embeddings",
    "save",
    "take_any_size",
    "tap_names",
    "taps",
    "unsoftmax",
]
