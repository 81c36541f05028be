"""Bytes of photos (folders, ZIP archives, remote storage) and the one decoder.

In: a data root and an image path of the manifest. Out: bytes, RGB pixels (height, width, 3) uint8, or a BadImage.
Read first: reader.py, then decode.py.
"""
