"""`python -m pillsnap.cli` is `pillsnap`."""

from pillsnap.cli.main import app

app()
