"""The manifest stage: annotation files go in, a Parquet table with one row per clip comes out.

`formats` has one reader per annotation format. Begin with `run`; to add a format, copy one of the
readers.
"""
