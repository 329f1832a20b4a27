"""Pruning: curvatures, patterns, the pruner, and what belongs to them."""

from gossamer.pruning.blocks import decoder_blocks
from gossamer.pruning.curvature import BlockFisher, DiagFisher, LayerGram, Magnitude, MFACFisher, Wanda
from gossamer.pruning.masks import load_masks, save_masks
from gossamer.pruning.patterns import NM, Block, Unstructured
from gossamer.pruning.pruner import Pruner
from gossamer.pruning.reconstruction import Reconstruction
from gossamer.pruning.report import PruneReport
from gossamer.pruning.schedule import CubicSchedule

__all__ = [
    "NM",
    "Block",
    "BlockFisher",
    "CubicSchedule",
    "DiagFisher",
    "LayerGram",
    "MFACFisher",
    "Magnitude",
    "PruneReport",
    "Pruner",
    "Reconstruction",
    "Unstructured",
    "Wanda",
    "decoder_blocks",
    "load_masks",
    "save_masks",
]
