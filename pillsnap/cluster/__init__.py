"""The Ray session of a command, and checks of its nodes before a training.

In: settings. Out: a running Ray session; a list of checks.
Read first: session.py, then preflight.py.
"""
