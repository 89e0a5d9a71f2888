"""Measurements of ours beside a baseline, in the same run; needs no Ray."""
