"""Readers of annotation formats, one module each, that yield clip rows and rejected rows.

`READERS` in `pipelines/manifest/run.py` lists the formats and defines the interface of a reader.
"""
