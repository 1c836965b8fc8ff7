"""The method: losses, generators and exact token statistics.

Imports torch and the standard library, nothing else.
"""

from tbpo_cli.core import oracle as oracle
from tbpo_cli.core.baseline import StateBaseline as StateBaseline
from tbpo_cli.core.generators import GENERATORS as GENERATORS
from tbpo_cli.core.generators import Generator as Generator
from tbpo_cli.core.generators import build_generator as build_generator
from tbpo_cli.core.losses import LOSSES as LOSSES
from tbpo_cli.core.losses import Loss as Loss
from tbpo_cli.core.losses import build_loss as build_loss
from tbpo_cli.core.types import LossOutput as LossOutput
from tbpo_cli.core.types import PairScores as PairScores
from tbpo_cli.core.types import SideScores as SideScores
