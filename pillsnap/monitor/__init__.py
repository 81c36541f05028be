"""Watching a run: in the terminal and in a browser. Both only read its event log."""
