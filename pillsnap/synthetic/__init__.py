"""Renders pill photographs in the AI Hub layout, for the demo, the tests and the benchmarks.

In: number of classes and photos, and a seed. Out: a folder tree of photos and label JSON, a function of these.
Read first: generate.py, then render.py.

catalog.py    the synthetic drugs
shapes.py     a pill's body: height field, imprint, colours
trace.py      one pill as seen by the camera
render.py     one photograph
layout.py     list of photographs, and positions of their pills
labels.py     label JSON of a pill
generate.py   writes the tree
faults.py     ten kinds of defective files
"""

from __future__ import annotations

from pillsnap.synthetic.generate import GeneratedTree, generate

__all__ = ["GeneratedTree", "generate"]
