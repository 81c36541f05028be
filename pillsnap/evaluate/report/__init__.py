"""The HTML report of a run, in one file.

In: metrics, predictions and events of a run. Out: report.html.
Read first: page.py.
"""
