"""Import of external weights: the authors' released checkpoints, EVA, BLIP-2's Q-Former and BERT.

Start with `released`, which reads and writes the authors' format; `pretraining` builds a model for
pre-training, with `blip2` for the Q-Former.
"""
