"""Writes data in forms that other tools read, and reads a data set back into a clip store.

A manifest goes out as webdataset tars, and a clip store as a Parquet data set of the Hugging Face
Hub. Such a data set comes back as a clip store with the same rows. `weights` imports and exports
the authors' released weights.
"""
