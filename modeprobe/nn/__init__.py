"""Modules that take the place of those of the same name in ``torch.nn``."""

from modeprobe.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from modeprobe.nn.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
)
from modeprobe.nn.policy import commit_statistics, discard_statistics, set_statistics

__all__ = [
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "SyncBatchNorm",
    "commit_statistics",
    "discard_statistics",
    "set_statistics",
]
