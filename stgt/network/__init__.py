"""The network: maps frames and text tokens to embeddings and logits.

`vision` encodes frames, `graph` relates patches of neighboring frames, and `qformer` relates the
resulting visual tokens to text. Start with `stgt.model`, which combines them.
"""
