"""The network: frames and tokens go in, embeddings and logits come out.

`vision` encodes frames, `graph` relates patches of neighboring frames, and `qformer` compares them
with text. Begin with `stgt.model`, which joins them.
"""
