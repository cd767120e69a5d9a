"""The verdict on a run: its answers measured, zero-shot tasks, the criteria, the report."""
