"""Jobs for the command line and `ray job submit`; each parses flags and runs a pipeline stage."""
