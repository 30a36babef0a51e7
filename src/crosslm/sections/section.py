"""What every section of the configuration is, and the kinds of values that several have."""

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise ValueError("must be auto, cpu, cuda, mps or xpu, or one of several, like cuda:1")
    return name


Device = Annotated[str, AfterValidator(_known_device)]


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OF_A_NAME = "start with a letter or digit, go on with these or . _ - (64 at most, all of them ASCII: no ü or é)"
"""What a name that folders are called by must do, in words."""


def _a_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"must {OF_A_NAME}")
    return name


Name = Annotated[str, AfterValidator(_a_name)]


def _known_encoding(name: str) -> str:
    try:
        "a".encode(name)
    except (LookupError, ValueError) as error:
        raise ValueError(
            "must be an encoding of text that Python knows, like utf-8, cp1252 (Windows in Western Europe) or utf-16"
        ) from error
    return name


Encoding = Annotated[str, AfterValidator(_known_encoding)]


class Section(BaseModel):
    """A part of the configuration: cannot be changed, knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts with true and false, and nobody means that."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted is not bool and bool not in get_args(wanted):
            raise ValueError("must be no true or false")
        return value
