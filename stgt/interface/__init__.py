"""What a video-language model offers to training, evaluation and storage, and which kinds exist.

Goes in: a model's config or folder. Comes out: a model with the methods of `VideoTextModel`. Begin
with README.md, the contract, and `model.py`; `kinds.py` lists the models.
"""
