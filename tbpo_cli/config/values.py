"""The kinds of values that the recipe's keys have, for pydantic to check."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
# What a message expects in place of a text that does not match a pattern: validate.PATTERNS.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Repository = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
HubId = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@.+)?$")]
Address = Annotated[str, Field(pattern=r"^https?://\S+$")]
