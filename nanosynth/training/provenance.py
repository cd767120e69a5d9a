"""Where a run's figures come from: command, commit, date, versions. Names no host and no user."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from nanosynth import settings


def versions() -> dict:
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def starts(config_path: Path, **facts: object) -> list[dict]:
    """The starts that a run's config.json has kept, and this one: a resumed run has several."""
    try:
        earlier = list(json.loads(config_path.read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):  # a new run, or one that kept none
        earlier = []
    this = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": settings.command_line(),
        "commit": commit(Path(__file__).parent),
    }
    return [*earlier, this | facts]


def commit(folder: Path) -> str | None:
    """The commit of the checkout around `folder`, with '-dirty' where tracked files differ from it.

    None where there is no git or no checkout: that is no error.
    """
    git = ["git", "--no-optional-locks", "-C", str(folder), "describe"]
    describe = ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            [*git, *describe], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
