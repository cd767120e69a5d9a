"""What train.py stands on: ranks, optimizers, the run's log.

Imports nothing of data/ or inference/.
"""
