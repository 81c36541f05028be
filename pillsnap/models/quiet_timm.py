"""timm, imported without W&B, which timm imports for its own training script.

W&B creates temporary folders at import and removes them at a regular exit, but Ray workers are killed. This has to
happen at import: modules that need timm import it from here, so that no earlier import of timm can load W&B.
"""

from __future__ import annotations

import sys
from typing import Any, cast

_was_there = "wandb" in sys.modules
if not _was_there:
    cast(dict[str, Any], sys.modules)["wandb"] = None  # makes the import fail, which timm handles
try:
    import timm
    import timm.optim
    import timm.utils
finally:
    if not _was_there:
        del sys.modules["wandb"]

__all__ = ["timm"]
