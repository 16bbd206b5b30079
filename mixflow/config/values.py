"""What entries are made of: the types of single values, and the base class of all entries."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mixflow.runtime.errors import UserError, did_you_mean

SCRATCH = "scratch"  # `init: scratch` starts from random weights
NAME_PATTERN = "^[a-z0-9][a-z0-9._-]*$"  # entry names are path components and Snakemake wildcards


def from_text(value: Any) -> Any:
    """Read text as YAML reads it where it is a number, a truth value or null.

    Snakemake's `--config` leaves every nested value as text.
    """
    if not isinstance(value, str):
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return read if read is None or isinstance(read, int | float) else value


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


TEXT = BeforeValidator(from_text)
LIST = BeforeValidator(_list_to_tuple)
Flag = Annotated[bool, TEXT]
Count = Annotated[int, Field(ge=1), TEXT]
Seed = Annotated[int, Field(ge=0, lt=2**63), TEXT]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), TEXT]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), TEXT]
Fraction = Annotated[float, Field(ge=0, le=1), TEXT]
BelowOne = Annotated[float, Field(ge=0, lt=1), TEXT]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]

Precision = Literal["fp32", "tf32", "bf16"]


class Entry(BaseModel):
    """Base of all entries: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise UserError(f"'{key}' is not a key here{did_you_mean(key, cls.model_fields)}")
        return values

    def dump(self, *left_out: str) -> dict[str, Any]:
        """Return the entry as plain JSON-able values, without what is absent or `left_out`."""
        return self.model_dump(mode="json", exclude_none=True, exclude=set(left_out))
