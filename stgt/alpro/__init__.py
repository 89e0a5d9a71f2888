"""ALPRO (Li et al. 2022): TimeSformer and BERT with a fusion encoder, for retrieval and questions.

`config` holds sizes, `model` the network, `pair_scorer` fast matching of many pairs, and `released`
the import and export of the authors' files.
"""
