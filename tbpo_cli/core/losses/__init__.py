"""The preference losses: one small frozen dataclass each, in one file a family, and their table.

A new loss is one class and one line in `LOSSES`.
"""

from __future__ import annotations

from typing import Any

from tbpo_cli.core.losses.anchored import ApoDown, ApoZero, Dpop
from tbpo_cli.core.losses.base import Loss as Loss
from tbpo_cli.core.losses.reference_free import Cpo, Orpo, Sft, SimPo
from tbpo_cli.core.losses.token_level import TbpoA, TbpoQ
from tbpo_cli.core.losses.token_weighted import ConfPo, D2po, LdDpo, TgDpo, TisDpo
from tbpo_cli.core.losses.token_weighted import importance_weights as importance_weights
from tbpo_cli.core.losses.whole_response import Bpo, Dpo, DpoNorm, Hinge, Ipo, Robust, Tdpo, Wpo

LOSSES: dict[str, type[Loss]] = {
    "sft": Sft,
    "dpo": Dpo,
    "dpo_norm": DpoNorm,
    "robust": Robust,
    "ipo": Ipo,
    "hinge": Hinge,
    "simpo": SimPo,
    "cpo": Cpo,
    "orpo": Orpo,
    "apo_zero": ApoZero,
    "apo_down": ApoDown,
    "dpop": Dpop,
    "bpo": Bpo,
    "tdpo": Tdpo,
    "wpo": Wpo,
    "ld_dpo": LdDpo,
    "d2po": D2po,
    "confpo": ConfPo,
    "tis_dpo": TisDpo,
    "tgdpo": TgDpo,
    "tbpo_q": TbpoQ,
    "tbpo_a": TbpoA,
}


def build_loss(name: str, **fields: Any) -> Loss:
    """The loss of that name.

    Raises KeyError, TypeError or ValueError for an unknown name, an unknown field or a bad value.
    """
    return LOSSES[name](**fields)


def name_of(loss: Loss) -> str:
    """The name under which the loss's class stands in `LOSSES`.

    Raises KeyError if it stands there under none.
    """
    names = {cls: name for name, cls in LOSSES.items()}
    return names[type(loss)]
