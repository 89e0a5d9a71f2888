"""Video question answering: answer vocabularies, classifier and its loss, accuracy by type.

Begin with `head.py`. Only `head.py`, `generation.py`, `answering.py` and `objective.py` load torch.
"""
