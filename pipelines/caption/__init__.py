"""Writes captions for clips with a model, on Ray Data or in this process.

A manifest and a checkpoint go in, and perhaps the clip store with the frames of the manifest. A new
manifest comes out, whose rows have the captions in their extras.
"""
