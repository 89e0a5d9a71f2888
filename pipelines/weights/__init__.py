"""Conversion of weights: files of the authors go in, a model folder comes out, and the reverse.

The conversion itself is in `stgt.weights`. Begin with `run`, which imports; `export` writes the
authors' form.
"""
