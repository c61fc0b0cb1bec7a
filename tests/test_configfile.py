"""Config files: overrides, the places of values, paths that start from the file."""

import json
import pickle
from pathlib import Path

import jsonschema
import pytest

from mpichunk.config.file import dump_config, json_schema, load_config
from mpichunk.config.text import parse
from tests.minimalconfig import GOOD, good_with, load, refusal

pytestmark = pytest.mark.usefixtures("workdir")


# ---- Overrides -------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    loaded = load(
        GOOD + "roi: {start: [0, 0, 0], stop: [1, 1, 1]}\n",
        "patch.overlap=[4, 64, 64]",
        "roi=null",
        "compute.threads=3",
        "compute.threads=2",
        "input.normalize.divide=1e2",
        "output.volume=elsewhere|zarr3:",
        "model.arguments={a: {b: [1, x]}}",
        "run_dir=",
    )
    config = loaded.config
    assert config.overlap == (4, 64, 64)
    assert config.roi is None
    assert config.compute.threads == 2
    assert config.input.normalize is not None
    assert config.input.normalize.divide == 100.0
    assert str(config.output.volume).endswith("/elsewhere|zarr3:")
    assert config.model.arguments == {"a": {"b": [1, "x"]}}
    assert config.run_dir.endswith("/runs/config")


def test_an_override_may_fill_a_section_set_to_null() -> None:
    loaded = load(GOOD + "roi: null\n", "roi.start=[0, 0, 0]", "roi.stop=[1, 2, 3]")
    assert loaded.config.roi is not None
    assert loaded.config.roi.stop == (1, 2, 3)


def test_an_override_of_a_section_replaces_it() -> None:
    loaded = load(GOOD + "schedule: {mode: static}\n", "schedule.max_attempts=1", "schedule={}")
    assert (loaded.config.schedule.mode, loaded.config.schedule.max_attempts) == ("dynamic", 3)
    assert loaded.overrides == ("schedule",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "patch.overlap=[4, 64, 300]",
            "--set patch.overlap: (4, 64, 300) must be smaller than the output patch "
            "(20, 256, 256)",
        ),
        ("patch.overlpa=1", "--set patch.overlpa: unknown key; did you mean `overlap`?"),
        (
            "roi={start: [0, 0, 0], stop: [0, 0, 0]}",
            "--set roi: roi.stop: (0, 0, 0) must be greater than roi.start (0, 0, 0) on every axis",
        ),
        (
            "patch.overlap",
            "--set patch.overlap: must be `--set section.key=value`, "
            "e.g. `--set patch.batch_size=2`",
        ),
        ("=3", "--set =3: must be `--set section.key=value`, e.g. `--set patch.batch_size=2`"),
        (
            "patch..shape=3",
            "--set patch..shape=3: must be `--set section.key=value`, "
            "e.g. `--set patch.batch_size=2`",
        ),
        (
            "patch.overlap=[4, 64",
            "--set patch.overlap:1:7: is not YAML: while parsing a flow sequence, expected ',' or "
            "']', but got '<stream end>'; look at indentation, quotes and brackets up to here",
        ),
        ("roi={start: 1, start: 2}", "--set roi: start: given 2 times; keep one"),
        (
            "patch.shape.0=3",
            "--set patch.shape.0: patch.shape is a value, not a section, and has no keys to set",
        ),
    ],
)
def test_mistakes_in_overrides_name_them(override: str, message: str) -> None:
    assert refusal(GOOD, override) == [message]


def test_mistakes_of_the_file_come_before_those_of_overrides() -> None:
    assert [
        line.partition(": ")[0]
        for line in refusal(GOOD + "bogus: 1\n", "patch.window=x", "block.stitch=y")
    ] == ["config.yaml:11", "--set patch.window", "--set block.stitch"]


# ---- Places ----------------------------------------------------------------------------------


def test_locate() -> None:
    loaded = load(GOOD + "roi: null\n", "patch.batch_size=2", "roi={start: [0,0,0], stop: [1,1,1]}")
    expected = {
        "patch.shape": "config.yaml:6: patch.shape",
        "patch.overlap": "config.yaml:5: patch.overlap",
        "schedule.mode": "config.yaml: schedule.mode",
        "patch.batch_size": "--set patch.batch_size",
        "roi": "--set roi",
        "roi.start": "--set roi: roi.start",
        "": "config.yaml",
    }
    assert {key: loaded.locate(key) for key in expected} == expected


def test_warnings_name_their_place() -> None:
    loaded = load(
        good_with("  shape: [128", "  stitch: seamless\n  margin: [0, 0, 0]\n  shape: [128")
    )
    assert loaded.warnings() == (
        "config.yaml:9: block.margin: (0, 0, 0) has no effect with `stitch: seamless`, "
        "which has no margin",
    )


def test_a_loaded_config_travels() -> None:
    loaded = load(GOOD, "patch.window=hann")
    assert pickle.loads(pickle.dumps(loaded)) == loaded


# ---- Paths -----------------------------------------------------------------------------------


def test_relative_paths_start_from_the_file(workdir: Path) -> None:
    Path("configs").mkdir()
    path = Path("configs/mine.yaml")
    path.write_text(
        """\
input: {volume: "precomputed://file://../data/em"}
mask: {volume: mask.h5}
model: {backend: pytorch, path: nets/unet.py:UNet, weights: ../weights.pt}
patch: {shape: [20, 256, 256]}
block: {shape: [128, 1152, 1152]}
output:
  volume: file://out/pred|zarr3:
"""
    )
    config = load_config(path, ["mask.mip=1"]).config
    assert config.input.volume == f"precomputed://file://{workdir}/data/em"
    assert config.mask is not None
    assert config.mask.volume == f"{workdir}/configs/mask.h5"
    assert config.model.path == f"{workdir}/configs/nets/unet.py:UNet"
    assert config.model.weights == f"{workdir}/weights.pt"
    assert config.output.volume == f"file://{workdir}/configs/out/pred|zarr3:"
    assert config.run_dir == f"{workdir}/configs/runs/mine"


def test_the_effective_config_starts_the_same_run_from_anywhere() -> None:
    loaded = load(GOOD, "compute.threads=2")
    text = dump_config(loaded.config)
    assert text.startswith("# The effective config of a run")
    Path("elsewhere").mkdir()
    copy = Path("elsewhere/copy.yaml")
    copy.write_text(text)
    assert load_config(copy).config == loaded.config
    assert dump_config(load_config(copy).config) == text


EXAMPLE = """\
input:
  volume: precomputed://file://data/em     # cloud-volume style, or another
  mip: 0
  dataset: raw                             # inside an HDF5 file
  pad: reflect
  voxel_size: [40, 4, 4]                   # zyx, nm; these two override or supply metadata
  voxel_offset: [0, 0, 0]
roi: {start: [0, 0, 0], stop: [128, 2048, 2048]}
mask: {volume: ..., mip: 3, invert: false}
model:
  backend: pytorch
  path: net.py:Net
  weights: weights.pt
  out_channels: 3
  activation: none                         # none | sigmoid | softmax
  skip_blank: true
patch: {shape: [20, 256, 256], overlap: [4, 64, 64], crop: [0, 0, 0], batch_size: 1, window: bump}
block: {shape: [128, 1152, 1152], stitch: crop, margin: [2, 32, 32]}
output:
  volume: file://out/affinity|zarr3:
  dtype: uint8
  chunk_shape: [64, 64, 64]
  shard_shape: null
compute: {device: auto, precision: float32, threads: null}
schedule: {mode: dynamic, max_attempts: 3}
run_dir: runs/affinity
"""


def test_an_example_with_every_kind_of_value() -> None:
    config = load(EXAMPLE).config
    assert config.model.activation == "none"
    assert str(config.output.volume).endswith("/out/affinity|zarr3:")
    jsonschema.validate(parse(EXAMPLE, "").values, json.loads(json_schema()))
