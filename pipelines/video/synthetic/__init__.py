"""Generates captioned videos of moving shapes for the quickstart and for tests.

The dataset depends only on a seed and has WebVid-style annotations. Start with `scenes`; `render`
draws a scene, and `dataset` writes the files.
"""
