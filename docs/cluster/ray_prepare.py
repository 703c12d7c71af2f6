"""One corpus prepared on a Ray cluster:  ray job submit --working-dir . -- python docs/cluster/ray_prepare.py TEXTS SHARDS 64

TEXTS and SHARDS lie where every machine sees them. However many of the 64 run at once, those that do run do all of the work.
"""

import sys

import ray


@ray.remote(num_cpus=4, max_retries=3)
def process(texts: str, shards: str, shard: str) -> int:
    """What each of the processes does; one that is lost is begun again, and others have done its part by then."""
    import nextword

    return nextword.prepare(texts, shards, shard=shard).documents


if __name__ == "__main__":
    texts, shards, parts = sys.argv[1:4]
    ray.init()
    ray.get([process.remote(texts, shards, f"{number}/{parts}") for number in range(1, int(parts) + 1)])
