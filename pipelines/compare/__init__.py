"""The compare stage: computes differences between finished evaluations, with intervals.

Published results under the same protocol are shown for reference. Start reading at `run`.
"""
