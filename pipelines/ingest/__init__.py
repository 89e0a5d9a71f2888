"""The ingest stage: a manifest goes in, a clip store with a quarantine and a report comes out.

`plan` divides clips into shards, and `worker` decodes and writes one shard. Begin with `run`.
"""
