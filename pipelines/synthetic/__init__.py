"""Generated videos of moving shapes with captions, for the quickstart and for tests.

A seed goes in, and a data set with WebVid-style annotations comes out. Begin with `scenes`;
`render` draws a scene, and `dataset` writes the files.
"""
