"""Training losses and the optimizer.

Start with `objective`, which computes the model's named `losses` for a batch split over any number
of workers.
"""
