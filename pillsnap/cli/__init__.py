"""The command line: parses options and delegates; nothing is computed here.

In: arguments of the shell. Out: exit code 0 (fine), 1 (a negative answer) or 2 (wrong usage or input).
Read first: main.py, which lists every command.
"""

from pillsnap.cli.main import app

__all__ = ["app"]
