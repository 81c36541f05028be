"""The decode-once store: crops and reduced frames in memory-mapped shards.

In: (key, encoded window) pairs. Out: the same windows by key; a shard is complete or absent.
Read first: shards.py.
"""
