"""Progress on standard error, once something has taken longer than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_PATIENCE = 2.0  # seconds


class Progress:
    """Call with what is being done. show: True at once, False never, None after two seconds."""

    def __init__(self, show: bool | None) -> None:
        self.show = show
        self.start = time.monotonic()
        self._status: Any = None

    def __call__(self, text: str) -> None:
        if self.show is False:
            return
        if self._status is None:
            if self.show is None and time.monotonic() - self.start < _PATIENCE:
                return
            from rich.console import Console

            console = Console(file=sys.stderr)
            self._status = console.status("", spinner="dots")
            self._status.start()
            if not console.is_terminal:
                console.print(f"modeprobe: {text}; this takes longer than two seconds")
        self._status.update(f"modeprobe: {text}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
