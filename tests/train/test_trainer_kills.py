"""The trainer killed while it trains and saves, at random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


TIMES = 3  # test_checkpoint.py has many more, of processes that do nothing but save


def test_a_killed_trainer_goes_on_from_its_last_complete_checkpoint(tmp_path):
    command = [sys.executable, "-m", "tests.train.killed_trainer", str(tmp_path), str(TIMES), "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == TIMES
    assert result["equal"]
