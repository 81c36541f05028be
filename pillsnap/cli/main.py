"""The `pillsnap` command: its subcommands, in the order of use, and its errors.

Exit codes: 0 fine, 1 a negative answer (targets missed, not fit), 2 wrong usage or input, 130 stopped on request.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

import pillsnap
from pillsnap.cli.config import config_app
from pillsnap.cli.manifest import manifest_app
from pillsnap.cli.plan import plan
from pillsnap.cli.prepare import prepare
from pillsnap.cli.results import evaluate, export, predict, verify
from pillsnap.cli.synth import synth
from pillsnap.cli.terminal import STOPPED
from pillsnap.cli.training import demo, preflight, train
from pillsnap.cli.watching import logs, monitor
from pillsnap.errors import UserError

_ORDER = (
    "demo", "manifest", "prepare", "plan", "preflight", "train", "evaluate", "predict", "export", "verify", "monitor",
    "logs", "synth", "config",
)  # fmt: skip
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class _Commands(TyperGroup):
    """Prints an error that a user can cause as one line; lists the commands in the order of use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_ORDER)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno not in _DENIED or error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}. Check its owner, mount and disk, or give another path.")
        except KeyboardInterrupt:
            Console(stderr=True).print("pillsnap: interrupted", style="red")
            sys.exit(STOPPED)


def _fail(message: str) -> NoReturn:
    Console(stderr=True).out(f"pillsnap: {message}", style="red", highlight=False)
    sys.exit(2)


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    demo, prepare, plan, preflight, train, evaluate, predict, export, verify, monitor, logs, synth
):  # fmt: skip
    app.command()(command)
app.add_typer(manifest_app, name="manifest")
app.add_typer(config_app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pillsnap {pillsnap.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate and run a two-stage pill recogniser."""
    # A run of somebody else may be the working directory: `python -m` in a child process would import from it.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
