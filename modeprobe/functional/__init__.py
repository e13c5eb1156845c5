"""Functions in the manner of ``torch.nn.functional``."""

from modeprobe.functional.batch_norm import batch_norm, sync_batch_norm
from modeprobe.functional.dropout import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_mask,
    feature_alpha_dropout,
)
from modeprobe.functional.fused_dropout import bias_dropout_add, softmax_dropout

__all__ = [
    "alpha_dropout",
    "batch_norm",
    "bias_dropout_add",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_mask",
    "feature_alpha_dropout",
    "softmax_dropout",
    "sync_batch_norm",
]
