"""What train.py stands on: ranks, optimizers, the run's log. Imports no other wing."""
