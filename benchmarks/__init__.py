"""Speed, recipes and faults: commands that measure."""

import nanosynth  # noqa: F401 - before torch, as in the scripts, whose OpenMP and Ctrl-C it sets
