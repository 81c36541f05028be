"""timm is imported without W&B, which would leave temporary folders behind in Ray workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

IMPORTS = "import os, sys, pillsnap.models.classifier, pillsnap.tasks.registry, pillsnap.train.step.training_state"


def ended_like_a_worker(code: str, temporary: Path) -> list[str]:
    """Names of W&B's temporary folders after a process exited without its exit handlers."""
    code = f"{IMPORTS}; {code}; os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TMPDIR": str(temporary)})
    return [path.name for path in temporary.iterdir() if "wandb" in path.name]


def test_imports_of_a_worker_leave_no_folders(tmp_path: Path) -> None:
    assert not ended_like_a_worker("assert 'timm' in sys.modules and 'wandb' not in sys.modules", tmp_path)


def test_wandb_can_still_be_imported(tmp_path: Path) -> None:
    assert ended_like_a_worker("import wandb; assert wandb.init", tmp_path)
