"""Import of external weights: the authors' released checkpoints, EVA and BERT.

Start with `released`, which reads and writes the authors' format; `pretraining` builds a model for
pre-training.
"""
