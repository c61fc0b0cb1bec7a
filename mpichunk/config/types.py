"""What a single config value may be, and the words that tell the user so.

The types of values, and what all sections share. Knows no section and no key.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


@dataclass(frozen=True, slots=True)
class Expected:
    """Marks a type with the words that complete "... must be"."""

    words: str
    """For the user, e.g. "a whole number, at least 1"."""


_Whole = Annotated[int, Field(strict=True)]
_Natural = Annotated[int, Field(strict=True, ge=0)]
_Positive = Annotated[int, Field(strict=True, ge=1)]
_Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_AboveZero = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1)]
_Spec = Annotated[dict[str, Any], Field(min_length=1)]

Flag = Annotated[bool, Field(strict=True), Expected("true or false")]
Text = Annotated[_Text, Expected("text")]
Threshold = Annotated[
    float, Field(strict=True, ge=0, allow_inf_nan=False), Expected("a number, at least 0")
]
Count = Annotated[_Positive, Expected("a whole number, at least 1")]
Level = Annotated[_Natural, Expected("a whole number, at least 0")]
Number = Annotated[_Real, Expected("a number")]
PositiveNumber = Annotated[_AboveZero, Expected("a number above 0")]
Interval = Annotated[tuple[_Real, _Real], Expected("two numbers, the lower first, e.g. [0, 255]")]
Position = Annotated[
    tuple[_Whole, _Whole, _Whole], Expected("three whole numbers zyx, e.g. [0, 0, 0]")
]
Width = Annotated[
    tuple[_Natural, _Natural, _Natural],
    Expected("three whole numbers zyx, none below 0, e.g. [4, 64, 64]"),
]
Extent = Annotated[
    tuple[_Positive, _Positive, _Positive],
    Expected("three whole numbers zyx, each at least 1, e.g. [20, 256, 256]"),
]
Size = Annotated[
    tuple[_AboveZero, _AboveZero, _AboveZero],
    Expected("three numbers zyx in nm, each above 0, e.g. [40, 4, 4]"),
]
Volume = Annotated[_Text | _Spec, Expected("a URL, a path, or a TensorStore spec (a mapping)")]
Arguments = Annotated[
    dict[str, Any], Expected("a mapping of keyword arguments, e.g. {channels: 16}")
]
Options = Annotated[dict[str, Any], Expected("a mapping of settings, e.g. {weights_key: ema}")]
Symmetries = Annotated[
    tuple[Literal["flip_z", "flip_y", "flip_x", "rot90"], ...],
    Expected("a list of some of `flip_z`, `flip_y`, `flip_x` and `rot90`"),
]
# A key read back from JSON is text.
AffinityChannels = Annotated[
    tuple[_Natural, _Natural, _Natural]
    | dict[Annotated[int, Field(ge=0)], tuple[_Whole, _Whole, _Whole]],
    Expected("three channels zyx, e.g. [0, 1, 2], or offsets by channel, e.g. {0: [-1, 0, 0]}"),
]
Channels = Annotated[
    tuple[_Natural, ...],
    Field(min_length=1),
    Expected("a list of channels, the first one is 0, e.g. [0, 1, 2]"),
]
Device = Annotated[
    str,
    Field(pattern=r"^[a-z]+(:[0-9]+)?$"),
    Expected("`auto`, `cpu`, `cuda` or another device of torch, e.g. `cuda:0`"),
]

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Backend = Literal["identity", "pytorch", "onnxruntime", "openvino", "pznet"]
Pad = Literal["reflect", "edge", "zero"]
Window = Literal["bump", "gaussian", "hann", "uniform"]
Stitch = Literal["crop", "seamless"]
OutputType = Literal["uint8", "int8", "uint16", "int16", "float16", "float32"]


class Section(BaseModel):
    """Shared by all sections: frozen, unknown keys refused, keys documented by docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_all_defaults(cls, data: Any) -> Any:
        """Take a header with nothing below it, as is left when every key is commented out."""
        return {} if data is None else data
