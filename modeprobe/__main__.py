"""``python -m modeprobe`` is the ``modeprobe`` command."""

from modeprobe.cli import main

if __name__ == "__main__":
    main()
