"""Trained models in other formats.

In: a finished run. Out: ONNX files and a stand-alone pipeline.py for onnxruntime.
Read first: onnx.py.
"""
