"""The HTML report of a run, in one file without external resources.

In: metrics, predictions and events of a run. Out: report.html, from the templates in templates/.
Read first: page.py, then templates/page.html.
"""
