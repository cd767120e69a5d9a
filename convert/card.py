"""A model card of what a run's folder knows, and the licence that the user names."""

import json
import shutil
from pathlib import Path

from huggingface_hub.utils import yaml_dump

from convert import runs
from nanosynth import UserError
from nanosynth.data import bins
from nanosynth.files import write_atomically
from nanosynth.table import table
from nanosynth.terminal import one_line

CARD = """---
{front}---

# {name}

A GPT-2 of {shape}, by nanosynth. It answers in ChatML:

```python
from transformers import pipeline

ask = pipeline("text-generation", "THIS FOLDER")
print(ask([{{"role": "user", "content": "What is 7 + 5?"}}]))
```

## Data

{data}

## Recipe

{recipe}

## Figures

{figures}

## Limits

- It says what is false as fluently as what is true. No human has judged whether it is safe.
- Its context is {block_size} tokens; past that, a text has to be cut.
- `<|im_start|>`, `<|im_end|>` and `<|endoftext|>` typed in a text are read as the tokens.
- llama.cpp merges newlines that open a message with the one before them, which training did not.
"""
RECIPE = (
    *("step", "rows_per_step", "block_size", "max_steps", "epochs", "optimizer", "learning_rate"),
    *("min_learning_rate", "warmup_steps", "decay", "weight_decay", "beta1", "beta2", "grad_clip"),
    *("dropout", "loss_on", "seed", "init_from"),
)
DATA = (
    *("source", "folder", "revision", "commit", "sha256", "rows_read", "rows_kept", "template"),
    "seed",
)


def write(folder: Path, path: Path, meta: dict, license: str, license_file: str) -> None:
    """README.md, and LICENSE where the user has one, of the step folder `path` of this `meta`."""
    if license_file:
        with runs.reading(f"--license_file={license_file}"):
            shutil.copyfile(license_file, folder / "LICENSE")
    shape, settings = meta["identity"]["model"], meta.get("settings", {})
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"license": license} if license else {}
    text = CARD.format(
        front=yaml_dump(front, sort_keys=False),
        name=one_line(path.resolve().parent.name),
        shape=f"{shape['n_layer']} layers, {shape['n_head']} heads and {shape['n_embd']} channels",
        data=_rows(_data(settings.get("data_dir", "")) | meta.get("source", {}), DATA)
        or "Not known here.",
        recipe=_rows(settings | {"step": meta["step"]}, RECIPE),
        figures=_figures(path),
        block_size=shape["block_size"],
    )
    write_atomically(folder / "README.md", text)


def _data(data_dir: str) -> dict:
    try:
        return bins.read_meta(data_dir)
    except UserError:
        return {}  # the run was moved, or came from elsewhere


def _rows(facts: dict, names: tuple[str, ...]) -> str:
    found = {name: facts[name] for name in names if facts.get(name) not in (None, "")}
    return "\n".join(f"- {name}: {json.dumps(value)}" for name, value in found.items())


def _figures(path: Path) -> str:
    """The verdict's criteria on the run, from the report beside the step folder."""
    if not (written := path.parent / "report.json").exists():
        return f"Not judged yet: `python -m verdict --run={path.parent}`."
    rows = [["criterion", "threshold", "figure", "95% interval", "verdict"]]
    with runs.reading(written, "is no report of python -m verdict"):
        report = json.loads(written.read_bytes())
        for judged in report["criteria"]:
            interval = " to ".join(f"{end:.4g}" for end in judged["interval"] or ())
            figure = "-" if judged["figure"] is None else f"{judged['figure']:.4g}"
            cells = [judged["criterion"], judged["threshold"], figure, interval, judged["verdict"]]
            rows.append(list(map(one_line, cells)))
        how = [one_line(f"- {name}: {text}") for name, text in report["how"].items()]
        return "\n".join([table(rows, left=(0, 1, 4), markdown=True), "", *how])
