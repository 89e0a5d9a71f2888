"""Files that stages hand over: manifest, clip store, checkpoint, embeddings, published figures.

Each module reads and writes one kind of file and states its layout. Begin with `manifest` and
`clip_store`.
"""
