"""Zero-shot tasks by lm_eval's own model class, on the run as transformers reads it.

Our three need no network; `lm_eval --include_path data/tasks --tasks questions ...` runs them too.
Imports lm_eval (requirements-eval.txt), so it is imported only where it is used.
"""

import contextlib
import io
import logging
import sys
import tempfile
from pathlib import Path

import lm_eval.evaluator
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from convert.hf import HFConfig, export_run
from nanosynth import tokenizer
from verdict import LOCAL_TASKS, TASKS_DIR

BOOTSTRAP_ITERATIONS = 1000  # for the metrics whose standard error has no formula


def as_lm(run: str, step: str, device: torch.device, dtype: torch.dtype, batch_size: int) -> HFLM:
    """A run's checkpoint as lm_eval knows models, by way of a temporary folder."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_run(HFConfig(run=run, step=step, to=folder), Path(folder))
        return HFLM(
            pretrained=folder,
            device=str(device),
            dtype=dtype,
            batch_size=batch_size,
            prefix_token_id=tokenizer.END_OF_TEXT,  # stands before what has no context
            add_bos_token=False,
        )


def measure(lm: HFLM, names: list[str], *, limit: int, chat_format: bool) -> tuple[dict, list[str]]:
    """(figures by task, a line for each name that could not be run)."""
    for library in ("lm_eval", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # lm_eval's own tasks are thousands of files: seconds to list.
    manager = TaskManager(
        include_path=str(TASKS_DIR), include_defaults=not {*names} <= {*LOCAL_TASKS}
    )
    # lm_eval's progress bars can't be told to stay out of log files.
    hides = contextlib.redirect_stderr(io.StringIO())
    shows_bars = contextlib.nullcontext() if sys.stderr.isatty() else hides
    figures: dict[str, dict] = {}
    not_run = []
    for name in names:
        if name not in manager.all_tasks:
            wanted = f"{', '.join(LOCAL_TASKS)} or one of lm_eval's"
            not_run.append(f"no task {name!r}; wanted {wanted}")
            continue
        try:
            with shows_bars:
                loaded = manager.load([name])
                measured = lm_eval.evaluator.evaluate(
                    lm,
                    loaded,
                    limit=limit or None,
                    bootstrap_iters=BOOTSTRAP_ITERATIONS,
                    apply_chat_template=chat_format,
                )
        except Exception as error:  # the hub's, its data's, or of a task that asks for more context
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            where = "its data comes from the Hugging Face hub, by network or from the hub's cache"
            not_run.append(f"task {name!r} could not be run ({reason}); {where}")
            continue
        scores = _figures(measured, loaded["tasks"])
        figures |= {task: scored | {"asked_as": name} for task, scored in scores.items()}
    return figures, not_run


def _figures(measured: dict, loaded: dict) -> dict[str, dict]:
    """For each task: metric, score, stderr, chance, n, all its `metrics`, and the `scores` of its
    single questions where they are numbers.

    The score is acc_norm (likelihood a character) where the task has it, else acc, else its first.
    """
    figures = {}
    for task, results in measured["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in results.items()
            if "," in key and isinstance(value, int | float)
        }
        names = [name for name in metrics if "_stderr" not in name]
        if not names:
            continue
        metric = next((name for name in ("acc_norm", "acc") if name in names), names[0])
        samples = measured["samples"].get(task, [])
        is_choice = task in loaded and loaded[task].OUTPUT_TYPE == "multiple_choice" and samples
        chances = [1 / len(sample["arguments"]) for sample in samples] if is_choice else []
        scores = [sample.get(metric) for sample in samples]
        figures[task] = {
            "scores": scores if all(isinstance(one, int | float) for one in scores) else [],
            "metric": metric,
            "score": float(metrics[metric]),
            "stderr": metrics.get(f"{metric}_stderr"),
            "chance": sum(chances) / len(chances) if chances and metric.startswith("acc") else None,
            "n": len(samples),
            "metrics": metrics,
        }
    return figures
