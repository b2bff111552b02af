"""Checkpoints: where weights come from, read slice by slice."""

from core.weights.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
