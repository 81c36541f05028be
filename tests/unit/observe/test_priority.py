"""What only watches runs at the lowest priority."""

from __future__ import annotations

import subprocess
import sys

CODE = "import os; from pillsnap.observe.priority import give_way; give_way(); give_way(); print(os.nice(0))"


def test_it_is_the_last_to_run() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "19"
