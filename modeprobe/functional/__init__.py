"""Functions in the manner of ``torch.nn.functional``."""

from modeprobe.functional.dropout import dropout, dropout_mask

__all__ = ["dropout", "dropout_mask"]
