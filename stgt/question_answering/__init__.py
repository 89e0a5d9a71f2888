"""Video question answering: answer vocabularies, classifier and its loss, accuracy by type.

Only `head.py` and `objective.py` load torch.
"""
