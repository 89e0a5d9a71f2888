"""Training mathematics: a batch goes in, named losses come out; and the optimizer.

`objective` is where the model meets its `losses`, over any number of workers. Begin there.
"""
