"""Renders pill photographs in the AI Hub layout, for the demo, the tests and the benchmarks.

catalog.py    the invented drugs
shapes.py     a drug's body: height field, imprint, colours
render.py     one photograph
layout.py     which photographs there are, where the pills lie, their label JSON
generate.py   writes the tree
faults.py     files that are bad in ten ways
"""

from __future__ import annotations

from pillsnap.synthetic.generate import GeneratedTree, generate

__all__ = ["GeneratedTree", "generate"]
