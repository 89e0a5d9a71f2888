"""Readers of annotation formats, one module each, that yield clip rows and rejected rows."""
