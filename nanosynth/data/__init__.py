"""From rows of any source to bins, and from bins to batches.

Imports nothing of training/ or inference/.
"""

FILES = ("train.bin", "train_mask.bin", "val.bin", "val_mask.bin")
LABELS = ("train_sources.bin", "val_sources.bin")  # of each document its numbers, uint16
PICTURE = "stats.png"  # may stand beside them
