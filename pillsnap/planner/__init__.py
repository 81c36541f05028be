"""How long a training will take on this machine, before it starts.

In: settings and a manifest. Out: a plan with measured rates, minutes and what limits them.
Read first: estimate.py.
"""
