"""Weights of others: files of the authors, EVA and BERT go in, a model of this project comes out.

Begin with `released`, which reads and writes the authors' form; `pretraining` builds a model to
pre-train.
"""
