"""Model inputs: tokenizes captions, and selects and transforms the frames of clips.

Start with `tokenizer` for text and `transforms` for frames; `frame_choice` selects frames.
"""
