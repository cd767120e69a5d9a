"""How long torch's OpenMP threads spin: our choice, and what the library itself says it read."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanosynth
from tiny import REPO

TORCH = Path(importlib.util.find_spec("torch").origin).parent
LIBGOMP = sorted(TORCH.glob("lib/libgomp*")) + sorted(TORCH.glob("../torch.libs/libgomp*"))
LOAD = "import ctypes, sys, nanosynth; assert 'torch' not in sys.modules; ctypes.CDLL(sys.argv[1])"


@pytest.mark.parametrize(
    ("n_running", "n_cores", "spins"),
    [(1, 2, 10_000), (2, 2, 10_000), (3, 2, 1_000), (5, 8, 10_000)],
)
def test_threads_spin_less_where_others_need_the_cores(n_running, n_cores, spins):
    assert nanosynth.spin_count(n_running, n_cores) == spins


@pytest.mark.skipif(not LIBGOMP, reason="this torch has another OpenMP")
@pytest.mark.parametrize(
    ("said", "spins"),
    [
        ({}, "1000?0"),  # by the load of this moment
        ({"GOMP_SPINCOUNT": "77"}, 77),
        ({"OMP_WAIT_POLICY": "passive"}, 0),
        ({"OMP_WAIT_POLICY": "active"}, 30_000_000_000),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(said, spins):
    kept = {
        name: v
        for name, v in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, LIBGOMP[0]],
        env=kept | said | {"OMP_DISPLAY_ENV": "verbose"},
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(f"GOMP_SPINCOUNT = '{spins}'", done.stderr)
