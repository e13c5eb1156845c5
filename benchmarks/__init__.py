"""Benchmarks of modeprobe against its peers, installed as modeprobe.benchmarks."""
