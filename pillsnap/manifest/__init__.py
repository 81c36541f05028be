"""Sources of photos (AI Hub, YOLO folders, CSV) -> the manifest, the only truth about data.

In: folders or archives of photos with labels. Out: manifest.parquet, classes.json, CSV copies, import_report.json.
Read first: table.py (the schema), then build.py.
"""
