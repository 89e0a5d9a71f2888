"""Rate of an ingest on three hosts, or on one with as many CPUs: `python -m ... [REPEATS [CLIPS]]`.

Hosts are made of namespaces, which need root, so this measurement is no part of `jobs.bench`. Runs
of the two alternate, and the figures are medians. It prints the row as `jobs.bench` does.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.artifacts.manifest import clip_hash, whole_videos_table
from pipelines.bench.decode import SECONDS
from pipelines.bench.gates import judge, machine, read_gates
from pipelines.bench.harness import Measured, higher
from pipelines.bench.ingest import CLIPS, GOP, VIDEOS
from pipelines.bench.videos import make_videos
from pipelines.common import storage
from tests.helpers import hosts
from tests.helpers.hosts import OUTPUT, Host
from tests.helpers.hosts_cluster import HostCluster, RunningJob, host_cluster

logger = logging.getLogger(__name__)

NODES = [0, 1, 1]
"""CPUs of the head, which only coordinates, and of two nodes that decode."""
LIMIT_S = 900


def main() -> None:
    """Measure, and print the row as one JSON line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if (why := hosts.missing()) is not None:
        sys.exit(why)
    given = [int(word) for word in sys.argv[1:]]
    repeats, clips = (*given, *(3, CLIPS)[len(given) :])
    with TemporaryDirectory() as folder, host_cluster(Path(folder), NODES) as cluster:
        put_clips(cluster, Path(folder), clips)
        alone = cluster.host("alone")
        rates: dict[str, list[float]] = {"three": [], "one": []}
        for repeat in range(repeats):
            for name in ("three", "one") if repeat % 2 == 0 else ("one", "three"):
                rates[name].append(rate_of(cluster, name, alone, repeat))
            last = {name: found[-1] for name, found in rates.items()}
            logger.info("run %d of %d: %s clips/s", repeat + 1, repeats, last)
    row = higher("hosts", "clips/s", Measured(rates["three"]), Measured(rates["one"]))
    (judged,) = judge([row], read_gates(None), machine("cpu"))
    print(json.dumps(judged.to_dict()))


def put_clips(cluster: HostCluster, folder: Path, clips: int) -> None:
    """Write the clips of `jobs.bench ingest` to S3."""
    videos = make_videos(folder / "videos", VIDEOS, SECONDS, GOP)
    ids = sorted((f"clip-{number:05d}" for number in range(clips)), key=clip_hash)
    uris = {
        name: f"s3://bucket/videos/{videos[number % VIDEOS].name}"
        for number, name in enumerate(ids)
    }
    table = whole_videos_table(uris, dict.fromkeys(ids, "a caption"), "bench")
    storage.write_table(str(folder / "manifest.parquet"), table)
    cluster.s3.put(f"{folder / 'videos'}/", "bucket/videos/", recursive=True)
    cluster.s3.put(str(folder / "manifest.parquet"), "bucket/manifest.parquet")


def rate_of(cluster: HostCluster, name: str, alone: Host, repeat: int) -> float:
    """Clips per second of one ingest, without the start of Ray and its workers."""
    flags = [
        "--manifest=s3://bucket/manifest.parquet", f"--output=s3://bucket/{name}{repeat}",
        f"--num-workers={sum(NODES)}", "--clips-per-shard=12",
        f"--tracking.uri=sqlite:///{OUTPUT}/{name}.db",
    ]  # fmt: skip
    if name == "three":
        job = cluster.start("ingest", *flags)
    else:
        job = RunningJob(alone, cluster.folder, "ingest", *flags)
    return float(job.summary(LIMIT_S)["clips_per_s"])


if __name__ == "__main__":
    main()
