"""From rows of any source to bins, and from bins to batches. Imports no other wing."""
