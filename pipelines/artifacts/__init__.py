"""Files that stages exchange, such as clip stores and checkpoints, and published results.

Each module reads and writes one kind of artifact and documents its layout. Start with `manifest`
and `clip_store`.
"""
