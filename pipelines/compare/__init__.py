"""The compare stage: finished evaluations go in, their differences with intervals come out.

Published figures of the same protocol are shown beside them. Begin with `run`.
"""
