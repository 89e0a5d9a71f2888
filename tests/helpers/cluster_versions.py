"""Makes a cluster say that it runs other versions, given as arguments: that of Ray and of Python.

Prints the versions that it said before. A head of another Python cannot be started here.
"""

import json
import os
import sys

from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient


def main() -> None:
    client = GcsClient(address=os.environ["RAY_ADDRESS"])
    said = client.internal_kv_get(CLUSTER_METADATA_KEY, namespace=KV_NAMESPACE_CLUSTER, timeout=10)
    metadata = json.loads(said)
    print(metadata["ray_version"], metadata["python_version"])
    metadata.update(ray_version=sys.argv[1], python_version=sys.argv[2])
    text = json.dumps(metadata).encode()
    client.internal_kv_put(
        CLUSTER_METADATA_KEY, text, True, namespace=KV_NAMESPACE_CLUSTER, timeout=10
    )


if __name__ == "__main__":
    main()
