"""Estimates how long a training takes on this machine, before it starts.

In: settings and, if there is one, a manifest. Out: measured rates, minutes per task, and what limits them.
Read first: estimate.py.
"""
