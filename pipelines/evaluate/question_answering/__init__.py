"""Evaluates how well a model answers questions about videos.

A checkpoint, clips, and a manifest with questions go in. Accuracy overall and by type of question,
every answer, and a report page come out. `jobs.evaluate --questions` runs it.
"""
