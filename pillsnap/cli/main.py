"""The `pillsnap` command: its subcommands, in the order of use, and its errors.

Exit codes: 0 fine, 1 a negative answer (targets missed, not fit), 2 wrong usage or input, 130 stopped on request.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.exceptions import Abort, Exit, TyperException

import pillsnap
from pillsnap.cli.config import config_app
from pillsnap.cli.enrol import enrol
from pillsnap.cli.environment import NARROWEST, clean_environment, require_plain_python
from pillsnap.cli.manifest import manifest_app
from pillsnap.cli.plan import plan
from pillsnap.cli.prepare import prepare
from pillsnap.cli.results import evaluate, export, predict, verify
from pillsnap.cli.synth import synth
from pillsnap.cli.terminal import STOPPED, console, dispensable_output
from pillsnap.cli.training import demo, preflight, train
from pillsnap.cli.watching import logs, monitor
from pillsnap.errors import UserError

_ORDER = (
    "demo", "manifest", "prepare", "plan", "preflight", "train", "evaluate", "predict", "enrol", "export", "verify",
    "monitor", "logs", "synth", "config",
)  # fmt: skip
_USUAL_WIDTH = 80
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class _Commands(TyperGroup):
    """Ends every command alike: an error is one line and exit code 2. Lists the commands in the order of use."""

    def main(self, *args: Any, **options: Any) -> Any:
        require_plain_python()
        clean_environment()
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # which the kernel ignores for process 1 of a container
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        if console.width < NARROWEST:
            console.width = _USUAL_WIDTH
        with dispensable_output():
            return super().main(*args, **options)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_ORDER)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(str(error))
        except (Abort, Exit, TyperException):
            raise
        except KeyboardInterrupt:
            Console(stderr=True).out("pillsnap: interrupted", style="red")
            sys.exit(STOPPED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DENIED and error.filename is not None:
                _fail(f"{error.filename}: {error.strerror}. Check its owner, mount and disk, or give another path.")
            from pillsnap.train.faults.diagnosis import diagnose

            _fail(str(diagnose(error, f"pillsnap {ctx.invoked_subcommand}", _keep_trace(error))))


def _keep_trace(error: Exception) -> Path:
    """The file that has the trace of an error: train.log, where the command writes one."""
    from pillsnap.observe.logs import log_file
    from pillsnap.storage import cache_folder

    path = log_file()
    if path is not None:
        logging.getLogger("pillsnap").error("the command ends", exc_info=error, extra={"file_only": True})
        return path
    path = cache_folder() / "error.log"
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    return path


def _fail(message: str) -> NoReturn:
    Console(stderr=True).out(f"pillsnap: {message}", style="red", highlight=False)
    sys.exit(2)


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    demo, prepare, plan, preflight, train, evaluate, predict, enrol, export, verify, monitor, logs, synth
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
