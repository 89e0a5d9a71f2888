"""Retrieval in numpy: computes ranks and metrics from embeddings, independently of Ray.

Start with `metrics` and `ranking`; `gallery` scores a whole gallery.
"""
