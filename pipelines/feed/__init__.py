"""Feeds training workers with batches of clips from clip stores or manifests.

`plan` computes which clip is used at which step, `sources` reads it, `other_texts` replaces its
captions, `opening` opens the datasets of a config, and `loader` runs on Ray Data's workers. Start
with `plan`. `features` stores the tokens of a frozen encoder, which can take the place of frames.
"""
