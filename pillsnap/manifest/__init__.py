"""Turns sources of photos (AI Hub, YOLO folders, CSV files) into a manifest, which everything downstream reads.

In: folders or archives of photos with labels. Out: manifest.parquet, classes.json, CSV copies, a report as JSON.
Read first: table.py (the schema), then build.py; selection/ has which photos are taken, and how they are split.
"""
