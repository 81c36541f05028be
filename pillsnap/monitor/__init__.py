"""Read-only monitors of a run: a terminal view and a web page.

In: a run directory or its URI. Out: the terminal view, or an HTTP server.
Read first: server.py, then hub.py.
"""
