"""From rows of any source to bins, and from bins to batches.

Imports nothing of training/ or inference/.
"""
