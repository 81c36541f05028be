"""Everything that touches private parts of Ray, each adapter behind a probe with a fallback of public API.

In: a stream's reads and a cluster to start. Out: Ray Data's source, pacing and placement, and a trimmed local cluster.
Read first: capabilities.py, which probes the adapters, then reads.py; docs/ray-internals.md has the table.
"""
