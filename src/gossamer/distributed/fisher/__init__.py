"""Second order over several processes: what they send each other, and checkpoints that any number of them can read."""

from gossamer.distributed.fisher.checkpoint import load_checkpoint, save_checkpoint
from gossamer.distributed.fisher.group import Group

__all__ = ["Group", "load_checkpoint", "save_checkpoint"]
