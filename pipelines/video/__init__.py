"""Decoding: a video file and a span go in, the exact frames of the clip come out.

A child process decodes, so that a file that hangs or crashes a decoder costs one clip. Begin with
`decoder`, which runs the child; `exact_frames` finds the frames.
"""
