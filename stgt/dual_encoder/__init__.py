"""Dual encoders of images and texts (CLIP, SigLIP) as video models: their frames are averaged.

Goes in: a folder in the form of the Hugging Face Hub. Comes out: a `DualEncoder`. Begin with
`model.py`; `hub.py` reads the folders and `config.py` says what can be set.
"""
