"""The method: losses, generators and exact token statistics. Imports torch and the standard library, nothing else."""

from tbpo_cli.core import oracle
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.generators import GENERATORS, Generator, build_generator
from tbpo_cli.core.losses import LOSSES, Loss, build_loss
from tbpo_cli.core.types import LossOutput, PairScores, SideScores

__all__ = [
    "GENERATORS",
    "LOSSES",
    "Generator",
    "Loss",
    "LossOutput",
    "PairScores",
    "SideScores",
    "StateBaseline",
    "build_generator",
    "build_loss",
    "oracle",
]
