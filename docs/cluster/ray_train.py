"""One run on a Ray cluster:  ray job submit --working-dir . -- python docs/cluster/ray_train.py SHARDS RUN

SHARDS and RUN lie where every machine sees them. Ray starts the processes and begins them again where one fails.
"""

import sys

import ray.train
from ray.train.torch import TorchTrainer


def process(settings: dict[str, str]) -> None:
    """What each of the processes does: Ray has made them known to each other, and nextword takes that up."""
    import nextword

    nextword.pretrain(settings["shards"], settings["run"], resume=True)


if __name__ == "__main__":
    shards, run = sys.argv[1:3]
    trainer = TorchTrainer(
        process, train_loop_config={"shards": shards, "run": run},
        scaling_config=ray.train.ScalingConfig(num_workers=16, use_gpu=True),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=3)),
    )  # fmt: skip
    trainer.fit()
