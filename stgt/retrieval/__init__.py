"""Retrieval mathematics in numpy: embeddings go in, ranks and metrics come out.

Nothing here knows Ray. Begin with `metrics`, then `ranking`; `gallery` scores a whole gallery.
"""
