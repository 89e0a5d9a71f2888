"""Stores the tokens of a frozen frame encoder for every frame of a clip store.

A finished clip store and a checkpoint go in. A folder of frame features comes out, with one file
per shard of the store, which trainings and evaluations read in place of frames.
"""
