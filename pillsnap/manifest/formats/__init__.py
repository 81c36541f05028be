"""Reads and writes the label formats of other tools. One file per format; all exchange `LabelledPhoto`.

In: a folder of photos with labels. Out: labelled photos (photo.py), which import_folder.py turns into a manifest.
Read first: photo.py, then yolo.py.
"""
