"""Where BatchNorm's running statistics come from, how far off they are, and exact ones instead."""

from modeprobe.statistics.contexts import batch_statistics, frozen_statistics
from modeprobe.statistics.drift import drift
from modeprobe.statistics.recalibrate import recalibrate
from modeprobe.statistics.report import (
    Change,
    DriftReport,
    Effect,
    LayerDrift,
    RecalibratedLayer,
    RecalibrationReport,
)

__all__ = [
    "Change",
    "DriftReport",
    "Effect",
    "LayerDrift",
    "RecalibratedLayer",
    "RecalibrationReport",
    "batch_statistics",
    "drift",
    "frozen_statistics",
    "recalibrate",
]
