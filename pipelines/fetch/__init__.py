"""Fetches the videos of a list of URLs.

In go a list of URLs, a table with a column of URLs, or a manifest whose videos are URLs. Out come
the files, a manifest that points to them, and a quarantine of the clips whose videos could not be
fetched.
"""
