"""Import of the authors' released weights into a model folder, and export to the same format.

The conversion itself is in `stgt.weights`. `run` imports and `export` exports.
"""
