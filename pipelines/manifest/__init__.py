"""The manifest stage: converts annotation files to a Parquet table with one row per clip.

`formats` contains one reader per annotation format, and `cutting` cuts long videos into clips.
Start with `run`. To add a format, copy one of the readers.
"""
