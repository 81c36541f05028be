"""The process of the command: `pillsnap`, and `python -m pillsnap.cli`."""

from pillsnap.cli.main import app
from pillsnap.processes import end_process


def main() -> None:
    """Run the command that the arguments name, and end the process with its exit code."""
    try:
        app()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            end_process(ended.code)
        raise


if __name__ == "__main__":
    main()
