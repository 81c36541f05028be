"""PillSnap: trains, evaluates and runs a two-stage pill recogniser."""

__version__ = "0.2.0"
