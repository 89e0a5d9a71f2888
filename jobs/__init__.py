"""What `ray job submit` runs: parse, call a pipeline, print one summary line, exit code."""
