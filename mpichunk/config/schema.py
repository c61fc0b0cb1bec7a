"""The config as frozen, checked values: what the user may write, and what it means.

Checks everything that needs no volume and no network. Knows no files and no YAML (that is
`config.file`).
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mpichunk.config.compute import Compute
from mpichunk.config.predictionrules import written_channels
from mpichunk.config.rules import (
    default_chunk_shape,
    find_problems,
    output_patch_shape,
)
from mpichunk.config.types import (
    AffinityChannels,
    Arguments,
    Backend,
    Channels,
    Count,
    Extent,
    Flag,
    Interval,
    Level,
    Number,
    Options,
    OutputType,
    Pad,
    Position,
    PositiveNumber,
    Section,
    Size,
    Stitch,
    Symmetries,
    Text,
    Threshold,
    Volume,
    Width,
    Window,
)
from mpichunk.geometry.box import Triple, triple


class Normalize(Section):
    """How raw values become the network's input, instead of dividing integers by their maximum."""

    subtract: Number = 0.0
    """Taken off each raw value."""

    divide: PositiveNumber = 1.0
    """What the rest is divided by."""

    clip: Interval | None = None
    """Raw values are clipped to this range first."""


class Input(Section):
    """The image volume that is read."""

    volume: Volume = Field(examples=["precomputed://file://data/em"])
    """cloud-volume URL, TensorStore URL, path, `synthetic://` URL, or TensorStore spec."""

    mip: Level = 0
    """Scale level, 0 = finest."""

    dataset: Text | None = None
    """Name of the dataset inside an HDF5 file."""

    pad: Pad = "reflect"
    """What lies outside the volume."""

    voxel_size: Size | None = None
    """Voxel size zyx in nm; overrides or supplies metadata."""

    voxel_offset: Position | None = None
    """Coordinates zyx of the first voxel; overrides or supplies metadata."""

    normalize: Normalize | None = None
    """Replaces the division of integer input by the maximum of its type."""


class Roi(Section):
    """The output box asked for, half-open, zyx in voxels."""

    start: Position = Field(examples=[[0, 0, 0]])
    """First voxel."""

    stop: Position = Field(examples=[[128, 2048, 2048]])
    """One past the last voxel."""


class Mask(Section):
    """Where output is wanted: non-zero voxels of a (usually coarser) volume."""

    volume: Volume = Field(examples=["data/mask.zarr"])
    """As `input.volume`."""

    mip: Level = 0
    """Scale level, 0 = finest."""

    dataset: Text | None = None
    """Name of the dataset inside an HDF5 file."""

    invert: Flag = False
    """Take the zero voxels instead."""

    voxel_size: Size | None = None
    """As `input.voxel_size`."""

    voxel_offset: Position | None = None
    """As `input.voxel_offset`."""


class Model(Section):
    """The network."""

    backend: Backend = Field(examples=["pytorch"])
    """What runs it."""

    path: Text | None = None
    """Saved network, `file.py:Name`, `package.module:Name`, a package, or the folder of a pznet."""

    weights: Text | None = None
    """safetensors file or checkpoint that belongs to a network given as code."""

    trust_pickle: Flag = False
    """Let checkpoints and `.pt2` files run the code that they may contain."""

    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments for that class or function."""

    options: Options = Field(default_factory=dict)
    """Settings of the backend itself, in its own words."""

    out_channels: Count = 1
    """Channels that the network returns."""

    activation: Literal["none", "sigmoid", "softmax"] = "none"
    """Applied to each patch before it is weighted."""

    augment: Symmetries = ()
    """Mirror images and rotations of each patch, whose predictions are averaged with its own."""

    affinity_channels: AffinityChannels | None = None
    """Channels of affinities: those along z, y and x to the voxel before, or offsets by channel."""

    skip_blank: Flag = True
    """Do not run patches whose input is all zero."""


class Patch(Section):
    """What the network sees, and how neighbouring predictions are blended."""

    shape: Extent = Field(examples=[[20, 256, 256]])
    """Spatial shape of the network's input."""

    overlap: Width | None = None
    """Overlap of neighbouring output patches; default: a quarter of the output patch."""

    crop: Width = (0, 0, 0)
    """Border that is cut off each side of the network's output."""

    batch_size: Count = 1
    """Patches per forward pass."""

    window: Window = "bump"
    """Blending weights of one output patch."""


class Block(Section):
    """The unit of scheduling and of writing."""

    shape: Extent = Field(examples=[[128, 1152, 1152]])
    """Voxels that one block writes; a multiple of the output's write unit."""

    stitch: Stitch = "crop"
    """How blocks are joined."""

    margin: Width | None = None
    """What is computed around a core and cropped away; default: half the overlap."""


class Gate(Section):
    """Where the prediction counts: where one channel, such as that of myelin, is low."""

    channel: Level = Field(examples=[3])
    """The channel that is looked at; the first one is 0."""

    below: Number = Field(examples=[0.2])
    """The others are kept where it is below this value, and are zero elsewhere."""


class Output(Section):
    """The volume that is written."""

    volume: Volume = Field(examples=["out/prediction.zarr"])
    """cloud-volume URL, TensorStore URL, path, or TensorStore spec."""

    dtype: OutputType = "float32"
    """Type of the stored values; of labels the default is uint8."""

    gate: Gate | None = None
    """Where the prediction counts; default: everywhere."""

    channels: Channels | None = None
    """Channels of the network that are used, in this order; default: all but that of the gate."""

    reduce: Literal["argmax", "vote"] | None = None
    """Write one channel: which one is largest, counted from 0, or from 1 by a vote."""

    threshold: Threshold | None = None
    """Write 1 where a value is above it, else 0."""

    chunk_shape: Extent | None = None
    """Storage chunk; default: the largest divisor of `block.shape` not above 64 per axis."""

    shard_shape: Extent | None = None
    """Shard that holds several chunks (zarr3 only)."""

    domain: Literal["input", "roi"] = "input"
    """What a new output covers."""

    @model_validator(mode="before")
    @classmethod
    def _labels_are_small(cls, data: Any) -> Any:
        """Let labels be uint8 where no type is given."""
        if not isinstance(data, Mapping) or "dtype" in data:
            return data
        has_labels = data.get("reduce") is not None or data.get("threshold") is not None
        return {**data, "dtype": "uint8"} if has_labels else data


class Schedule(Section):
    """How blocks are handed out."""

    mode: Literal["dynamic", "static"] = "dynamic"
    """Hand out one by one, or cut into equal contiguous runs at the start."""

    max_attempts: Count = 3
    """How often a block is tried before it is listed as failed."""

    max_consecutive_failures: Count = 10
    """Blocks that fail in a row, none done between them, before the run is stopped early."""

    min_lease_seconds: PositiveNumber = 300.0
    """A rank without progress for so long, and for ten times a typical block, counts as hung."""

    start_timeout_seconds: PositiveNumber = 600.0
    """Time that the start may take, until all ranks compute, before the job is ended."""

    stop_before_seconds: Level = 120
    """How long before the known end of the allocation the run stops handing out blocks."""


class Config(Section):
    """A whole run."""

    input: Input
    """The image volume that is read."""

    roi: Roi | None = None
    """The output box asked for; default: the whole input."""

    mask: Mask | None = None
    """Where output is wanted; default: everywhere."""

    model: Model
    """The network."""

    patch: Patch
    """What the network sees, and how predictions are blended."""

    block: Block
    """The unit of scheduling and of writing."""

    output: Output
    """The volume that is written."""

    compute: Compute = Compute()
    """Where and how the network runs."""

    schedule: Schedule = Schedule()
    """How blocks are handed out."""

    run_dir: Text
    """Directory of the journal and the logs; default: `runs/<config name>`."""

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        """Apply the rules that join values; `config.checks` names each key and line instead."""
        problems = find_problems(flatten(self))
        if problems:
            raise ValueError("; ".join(f"{p.key}: {p.message}" for p in problems))
        return self

    def with_defaults(self) -> "Config":
        """Return the effective config: every default that follows from other values is written out.

        Equal for a config that leaves a default away and one that spells it. With `seamless` the
        margin stays away, since it would have no effect.
        """
        patch = self.patch.model_copy(update={"overlap": self.overlap})
        output = self.output.model_copy(update={"chunk_shape": self.chunk_shape})
        block = self.block
        if block.stitch == "crop":
            block = block.model_copy(update={"margin": self.margin})
        return self.model_copy(update={"patch": patch, "block": block, "output": output})

    @property
    def output_patch_shape(self) -> Triple:
        """Q: what is left of a patch once its border is cut off."""
        return output_patch_shape(self.patch.shape, self.patch.crop)

    @property
    def overlap(self) -> Triple:
        """Overlap of neighbouring output patches."""
        if self.patch.overlap is not None:
            return self.patch.overlap
        return triple([q // 4 for q in self.output_patch_shape])

    @property
    def margin(self) -> Triple:
        """What a block computes around its core and crops away."""
        if self.block.margin is not None:
            return self.block.margin
        return triple([o // 2 for o in self.overlap])

    @property
    def chunk_shape(self) -> Triple:
        """Storage chunk of the output."""
        if self.output.chunk_shape is not None:
            return self.output.chunk_shape
        return default_chunk_shape(self.block.shape)

    @property
    def used_channels(self) -> tuple[int, ...]:
        """Channels of the network that what is written comes from, in order."""
        return written_channels(self.model.out_channels, self.output.channels, self.output.gate)

    @property
    def num_written_channels(self) -> int:
        """Channels of the output."""
        return 1 if self.output.reduce is not None else len(self.used_channels)

    @property
    def write_unit(self) -> Triple:
        """What is never written by two blocks: the shard, or the chunk when there are no shards."""
        return self.output.shard_shape or self.chunk_shape


def flatten(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return all values by dotted key, those of nested sections and the sections themselves too."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        values[prefix + name] = value
        if isinstance(value, Section):
            values |= flatten(value, f"{prefix}{name}.")
    return values
