"""The items of our local tasks for lm_eval, read from beside this file, so from any folder."""

import json
from pathlib import Path

from datasets import Dataset


def read(file: str, **_: object) -> dict[str, Dataset]:
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
