"""The fault campaign: what a run must survive, each fault really planted and counted.

Short counts run with the other tests; `make faults` runs the full ones
and writes benchmarks/FAULTS.md from what it saw.
"""
