"""The ingest stage: turns a manifest into a clip store with a quarantine and a report.

`plan` divides clips into shards, and `worker` decodes and writes a shard. Start reading at `run`.
"""
