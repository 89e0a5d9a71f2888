"""The quickstart: nothing goes in, and all stages run on generated videos.

It writes videos, ingests them, trains a small model in two stages and evaluates it. Begin with
`run`.
"""
