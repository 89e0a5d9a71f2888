"""What a model reads: captions become tokens, and stored frames become the frames of a sample.

Begin with `tokenizer` for text and `transforms` for frames; `frame_choice` decides which frames.
"""
