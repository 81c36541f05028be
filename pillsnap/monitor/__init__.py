"""Live views of a run: terminal and web page; read only.

In: a run directory. Out: a terminal view, or an HTTP server with a page.
Read first: server.py, then hub.py.
"""
