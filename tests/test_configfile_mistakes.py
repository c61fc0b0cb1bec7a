"""Mistakes in a config file: every one at once, each one message with its line."""

import os
from pathlib import Path

import pytest

from mpichunk.config.file import load_config
from mpichunk.config.schema import Schedule
from mpichunk.errors import ConfigError
from tests.minimalconfig import GOOD, good_with, refusal

pytestmark = pytest.mark.usefixtures("workdir")


SCHEDULE_KEYS = ", ".join(f"`{name}`" for name in Schedule.model_fields)


# ---- One mistake -----------------------------------------------------------------------------

REQUIRED = "`input`, `model`, `patch`, `block`, `output`"
OVERLAP = "  shape: [20, 256, 256]\n"
MISTAKES = [
    (
        good_with(OVERLAP, OVERLAP + "  overlap: [4, 64, 300]\n"),
        "config.yaml:7: patch.overlap: (4, 64, 300) must be smaller than the output patch "
        "(20, 256, 256)",
    ),
    (
        good_with("  shape: [20, 256, 256]", "  shape: 20"),
        "config.yaml:6: patch.shape: 20 must be three whole numbers zyx, each at least 1, "
        "e.g. [20, 256, 256]; write [20, 20, 20] for the same on every axis",
    ),
    (
        good_with("[20, 256, 256]", "[20, 256]"),
        "config.yaml:6: patch.shape: (20, 256) must be three whole numbers zyx, each at least 1, "
        "e.g. [20, 256, 256]",
    ),
    (
        good_with("[20, 256, 256]", "[20.0, 256, 0]"),
        "config.yaml:6: patch.shape: (20.0, 256, 0) must be three whole numbers zyx, each at "
        "least 1, e.g. [20, 256, 256]; write 20 instead of 20.0",
    ),
    (
        good_with("[20, 256, 256]", "20, 256, 256"),
        "config.yaml:6: patch.shape: '20, 256, 256' must be three whole numbers zyx, each at "
        "least 1, e.g. [20, 256, 256]",
    ),
    (
        good_with("  shape: [20, 256, 256]", "  batch_size: 2"),
        "config.yaml:5: patch.shape: missing. Spatial shape of the network's input, "
        "e.g. `shape: [20, 256, 256]`",
    ),
    (
        good_with("patch:\n  shape: [20, 256, 256]\n", ""),
        "config.yaml: patch: missing. What the network sees, and how predictions are blended, "
        "e.g. `patch: {shape: [20, 256, 256]}`",
    ),
    (
        good_with("  volume: data/em\n", ""),
        "config.yaml:1: input.volume: missing. cloud-volume URL, TensorStore URL, path, "
        "`synthetic://` URL, or TensorStore spec, e.g. `volume: precomputed://file://data/em`",
    ),
    (
        good_with("volume: data/em", "volume:"),
        "config.yaml:2: input.volume: is empty and must be a URL, a path, or a TensorStore spec "
        "(a mapping)",
    ),
    (
        good_with("volume: data/em", "volume: [data, em]"),
        "config.yaml:2: input.volume: ('data', 'em') must be a URL, a path, or a TensorStore spec "
        "(a mapping)",
    ),
    (
        good_with("volume: data/em", "volume: ''"),
        "config.yaml:2: input.volume: is empty and must be a URL, a path, or a TensorStore spec "
        "(a mapping)",
    ),
    (
        good_with("backend: identity", "backend: tensorflow"),
        "config.yaml:4: model.backend: 'tensorflow' must be `identity`, `pytorch`, `onnxruntime`, "
        "`openvino` or `pznet`",
    ),
    (
        good_with("backend: identity", "backend: Pytorch"),
        "config.yaml:4: model.backend: 'Pytorch' must be `identity`, `pytorch`, `onnxruntime`, "
        "`openvino` or `pznet`; "
        "did you mean `pytorch`?",
    ),
    (
        good_with("backend: identity", "backend: identity\n  out_channels: true"),
        "config.yaml:5: model.out_channels: true must be a whole number, at least 1",
    ),
    (
        good_with("backend: identity", "backend: identity\n  out_channels: '3'"),
        "config.yaml:5: model.out_channels: '3' must be a whole number, at least 1; "
        "leave out the quotes",
    ),
    (
        good_with("backend: identity", "backend: identity\n  skip_blank: no"),
        "config.yaml:5: model.skip_blank: 'no' must be true or false",
    ),
    (
        good_with("backend: identity", "backend: identity\n  arguments: [16]"),
        "config.yaml:5: model.arguments: (16) must be a mapping of keyword arguments, "
        "e.g. {channels: 16}",
    ),
    (
        good_with(OVERLAP, OVERLAP + "  batch_size:\n"),
        "config.yaml:7: patch.batch_size: is empty and must be a whole number, at least 1; "
        "leave the key out for the default",
    ),
    (
        good_with(OVERLAP, OVERLAP + "  overlpa: [4, 64, 64]\n"),
        "config.yaml:7: patch.overlpa: unknown key; did you mean `overlap`?",
    ),
    (
        good_with("  shape: [128", "  overlap: [4, 64, 64]\n  shape: [128"),
        "config.yaml:8: block.overlap: unknown key here; `overlap` belongs under `patch`",
    ),
    (
        GOOD + "shape: [1, 1, 1]\n",
        "config.yaml:11: shape: unknown key here; `shape` belongs under `patch` or under `block`",
    ),
    (
        GOOD + "  run_dir: runs/a\n",
        "config.yaml:11: output.run_dir: unknown key here; `run_dir` belongs at the top level",
    ),
    (
        GOOD + "patch.window: hann\n",
        "config.yaml:11: patch.window: unknown key; did you mean `window` under `patch`?",
    ),
    (
        GOOD + "schedul: {mode: static}\n",
        "config.yaml:11: schedul: unknown key; did you mean `schedule`?",
    ),
    (
        GOOD + "schedule: {qqqq: 1}\n",
        f"config.yaml:11: schedule.qqqq: unknown key; `schedule` has {SCHEDULE_KEYS}",
    ),
    (
        GOOD + "schedule: static\n",
        "config.yaml:11: schedule: 'static' must be a section with keys of its own: "
        f"{SCHEDULE_KEYS}",
    ),
    (
        GOOD + "compute: {device: GPU 1}\n",
        "config.yaml:11: compute.device: 'GPU 1' must be `auto`, `cpu`, `cuda` or another device "
        "of torch, e.g. `cuda:0`",
    ),
    (
        GOOD + "run_dir: 2024\n",
        "config.yaml:11: run_dir: 2024 must be text; put it in quotes",
    ),
    (
        good_with("volume: data/em", "volume: data/em\n  voxel_size: [40, 4, .nan]"),
        "config.yaml:3: input.voxel_size: (40, 4, nan) must be three numbers zyx in nm, "
        "each above 0, e.g. [40, 4, 4]",
    ),
    (
        good_with("volume: data/em", "volume: data/em\n  normalize: {divide: -1e-3}"),
        "config.yaml:3: input.normalize.divide: -0.001 must be a number above 0",
    ),
    (
        GOOD + "roi: {start: [0, 0, 0]}\n",
        "config.yaml:11: roi.stop: missing. One past the last voxel, "
        "e.g. `stop: [128, 2048, 2048]`",
    ),
    (
        GOOD + "\npatch:\n  shape: [20, 256, 256]\n",
        "config.yaml:12: patch: given 2 times, on lines 5, 12; keep one",
    ),
    (
        good_with("out/pred.zarr", "./data/em/"),
        "config.yaml:10: output.volume: 'FOLDER/data/em' is the input too, which would be "
        "overwritten; write somewhere else",
    ),
    (
        "",
        "config.yaml: is empty; a config needs the sections REQUIRED",
    ),
    (
        "# nothing yet\n",
        "config.yaml: is empty; a config needs the sections REQUIRED",
    ),
    (
        "- a\n- b\n",
        "config.yaml: holds no sections; a config needs the sections REQUIRED",
    ),
    (
        "some words",
        "config.yaml: holds no sections; a config needs the sections REQUIRED",
    ),
    ("input:\n\tvolume: x\n", "config.yaml:2:1: is indented with a tab; YAML allows spaces only"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[m[13:60] for _, m in MISTAKES])
def test_each_mistake_has_one_message_with_its_line(text: str, message: str, workdir: Path) -> None:
    assert refusal(text) == [message.replace("FOLDER", str(workdir)).replace("REQUIRED", REQUIRED)]


# ---- Many mistakes ---------------------------------------------------------------------------


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    text = """\
block: {shape: [128, 1000, 1152], margin: 5}
output:
  volume: out/pred|zarr2:
  dtype: float61
  shard_shape: [64, 64, 64]
patch:
  overlap: [4, 64, 300]
  shape: [20, 256, 256]
  window: bump
  window: hann
input: {volume: data/em, mipp: 1}
schedule: {mode: dynamic, max_attempts: 0}
"""
    assert [line.rpartition(".yaml")[2].split(": ")[:2] for line in refusal(text)] == [
        ["", "model"],
        [":1", "block.margin"],
        [":1", "block.shape"],
        [":4", "output.dtype"],
        [":5", "output.shard_shape"],
        [":5", "output.shard_shape"],
        [":7", "patch.overlap"],
        [":10", "patch.window"],
        [":11", "input.mipp"],
        [":12", "schedule.max_attempts"],
    ]


# ---- Files that are no config ----------------------------------------------------------------


def test_files_that_cannot_be_a_config() -> None:
    Path("image.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    Path("huge.yaml").write_bytes(b"#" * (2 << 20))
    expected = {
        "none.yaml": "no such file; name the config, a YAML file",
        ".": "is a directory; name the config, a YAML file",
        "image.h5": "is not a text file in UTF-8; name the config, a YAML file",
        "huge.yaml": "is larger than 1 MiB; a config is a short YAML file",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigError) as caught:
            load_config(Path(name))
        assert str(caught.value) == f"{name}: {message}"


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"^a\.yaml: cannot be read: Permission denied$"):
        load_config(Path("a.yaml"))


def test_byte_order_mark_and_crlf_are_taken() -> None:
    Path("config.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    loaded = load_config(Path("config.yaml"))
    assert loaded.lines["output.volume"] == 10


def test_the_file_may_be_named_with_its_whole_path() -> None:
    path = Path(os.path.abspath("config.yaml"))
    path.write_text(GOOD + "bogus: 1\n")
    with pytest.raises(ConfigError, match=rf"^{path}:11: bogus: unknown key"):
        load_config(path)
