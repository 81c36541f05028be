"""timm, imported without the W&B that its own training script logs to.

W&B makes temporary folders as soon as it is imported and removes them when Python ends in order, which a Ray worker
does not.
"""

from __future__ import annotations

import sys
from typing import Any, cast

_was_there = "wandb" in sys.modules
if not _was_there:
    cast(dict[str, Any], sys.modules)["wandb"] = None  # makes the import fail, which timm allows for
try:
    import timm
    import timm.optim
    import timm.utils
finally:
    if not _was_there:
        del sys.modules["wandb"]

__all__ = ["timm"]
