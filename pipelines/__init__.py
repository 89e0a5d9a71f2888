"""Ray programs, one stage a file: each public `run_*` takes a config and returns a result."""
