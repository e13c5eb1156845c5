"""Modules that take the place of those of the same name in ``torch.nn``."""

from modeprobe.nn.dropout import Dropout

__all__ = ["Dropout"]
