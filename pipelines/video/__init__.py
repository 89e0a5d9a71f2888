"""Decodes the exact frames of a clip from a video file and a time span.

Decoding runs in a child process, so a file that hangs or crashes the decoder affects only one clip.
Start with `decoder`, which runs the child process; `exact_frames` locates the frames. `synthetic`
generates captioned videos.
"""
