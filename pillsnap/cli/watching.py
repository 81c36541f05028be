"""`pillsnap monitor` and `logs`: read a run while it trains, or afterwards."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pillsnap.cli.options import NamedRun, named_run
from pillsnap.cli.terminal import console, say


def monitor(
    run_dir: NamedRun,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Serve a page for the browser on this port.",
                     show_default="none: show the run in this terminal; 8888 with --daemon"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; any other than the default requires --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(envvar="PILLSNAP_MONITOR_TOKEN", help="Secret that viewers must give.", show_default="none"),
    ] = None,
    public_url: Annotated[
        str,
        typer.Option(help="Address of the page at a reverse proxy, such as https://name/pillsnap/; requires --token.",
                     show_default="none"),
    ] = "",
    daemon: Annotated[bool, typer.Option(help="Serve the page from a background process.")] = False,
    stop: Annotated[bool, typer.Option(help="End the background process.")] = False,
) -> None:  # fmt: skip
    """Watch a run in this terminal, or in a browser with --port or --daemon."""
    from pillsnap.monitor import daemon as background
    from pillsnap.monitor.live_copy import live_copy
    from pillsnap.monitor.server import DEFAULT_PORT, serve
    from pillsnap.monitor.terminal import watch

    where = named_run(run_dir)
    if stop:
        say(f"ended process {background.stop(where)}")
    elif daemon:
        pid = background.start(where, port or DEFAULT_PORT, host, token, public_url)
        say(f"process {pid} serves {public_url or f'http://{host}:{port or DEFAULT_PORT}'}")
    else:
        os.nice(19)  # below Ray's workers, which run at 15
        with live_copy(where) as directory:
            if port:
                serve(directory, host, port, token, public_url)
            else:
                raise typer.Exit(watch(directory, console))


def logs(
    run_dir: NamedRun,
    follow: Annotated[bool, typer.Option(help="Keep printing as the log grows, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option(min=0, help="Lines from the end to start with.")] = 50,
) -> None:
    """Print the end of a run's train.log."""
    from pillsnap.monitor.live_copy import live_copy
    from pillsnap.observe.logs import tail_log

    with live_copy(named_run(run_dir)) as directory:
        for line in tail_log(directory, lines, follow):
            typer.echo(line)
