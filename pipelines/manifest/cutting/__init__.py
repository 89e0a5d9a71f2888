"""Cuts the videos of a manifest into clips: into windows of one length, or at changes of shot.

Rows of whole videos or of long spans go in, and rows of their parts come out. Subtitles beside the
videos may become the captions. Start with `run`.
"""
