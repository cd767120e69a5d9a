"""The verdict on a run: its answers measured, zero-shot tasks, the criteria, the report."""

from pathlib import Path

TASKS_DIR = Path(__file__).resolve().parent.parent / "data" / "tasks"
LOCAL_TASKS = ("questions", "completion", "reasoning")  # TASKS_DIR has a .yaml and a .jsonl of each
