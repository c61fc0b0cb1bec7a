"""Config files: every mistake at once with its line, overrides, paths, round trips, the schema."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpichunk.config.file import LoadedConfig, dump_config, json_schema, load_config
from mpichunk.config.schema import Config, Schedule
from mpichunk.config.text import parse, render
from mpichunk.errors import ConfigError

SCHEDULE_KEYS = ", ".join(f"`{name}`" for name in Schedule.model_fields)

GOOD = """\
input:
  volume: data/em
model:
  backend: identity
patch:
  shape: [20, 256, 256]
block:
  shape: [128, 1152, 1152]
output:
  volume: out/pred.zarr
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that messages begin with the bare name of the file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> LoadedConfig:
    path = Path("config.yaml")
    path.write_text(text)
    return load_config(path, overrides)


def refusal(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert len(caught.value.problems) == len(str(caught.value).splitlines())
    return str(caught.value).splitlines()


def good_with(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


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
    ("input:\n\tvolume: x\n", "config.yaml:2:1: is indented with a tab; YAML takes spaces only"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[m[13:60] for _, m in MISTAKES])
def test_each_mistake_has_one_message_with_its_line(text: str, message: str, folder: Path) -> None:
    assert refusal(text) == [message.replace("FOLDER", str(folder)).replace("REQUIRED", REQUIRED)]


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


def test_files_that_cannot_be_a_config(folder: Path) -> None:
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


def test_relative_paths_start_from_the_file(folder: Path) -> None:
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
    assert config.input.volume == f"precomputed://file://{folder}/data/em"
    assert config.mask is not None
    assert config.mask.volume == f"{folder}/configs/mask.h5"
    assert config.model.path == f"{folder}/configs/nets/unet.py:UNet"
    assert config.model.weights == f"{folder}/weights.pt"
    assert config.output.volume == f"file://{folder}/configs/out/pred|zarr3:"
    assert config.run_dir == f"{folder}/configs/runs/mine"


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


# ---- Round trip ------------------------------------------------------------------------------

NAMES = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
)
TRIPLES = st.tuples(*[st.integers(1, 40)] * 3)
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def config_values(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the values of a valid config, lists where YAML has lists."""

    def below(shape: list[int]) -> list[int]:
        return [draw(st.integers(0, n)) for n in shape]

    def times(shape: list[int]) -> list[int]:
        return [n * draw(st.integers(1, 3)) for n in shape]

    patch, crop = list(draw(TRIPLES)), list(draw(TRIPLES))
    chunk = list(draw(TRIPLES))
    shard = draw(st.none() | st.just(times(chunk)))
    start = [draw(st.integers(-99, 99)) for _ in range(3)]
    values: dict[str, Any] = {
        "input": {
            "volume": f"/data/{draw(NAMES)}",
            "dataset": draw(st.none() | NAMES),
            "voxel_size": draw(st.none() | st.lists(POSITIVE, min_size=3, max_size=3)),
            "normalize": draw(st.none() | st.fixed_dictionaries({"divide": POSITIVE})),
        },
        "roi": draw(
            st.none()
            | st.just({"start": start, "stop": [a + n for a, n in zip(start, patch, strict=True)]})
        ),
        "model": {
            "backend": "pytorch",
            "path": draw(st.sampled_from(["net.pt", "nets.py:Net", "my.nets:Net"])),
            "out_channels": draw(st.integers(1, 4)),
        },
        "patch": {
            "shape": [n + 2 * c for n, c in zip(patch, crop, strict=True)],
            "crop": crop,
            "overlap": draw(st.none() | st.just(below([n - 1 for n in patch]))),
        },
        "block": {
            "shape": times(shard or chunk),
            "stitch": draw(st.sampled_from(["crop", "seamless"])),
            "margin": draw(st.none() | st.just(below(patch))),
        },
        "output": {"volume": "out.zarr", "chunk_shape": chunk, "shard_shape": shard},
    }
    if values["model"]["path"] != "net.pt":
        values["model"]["arguments"] = draw(
            st.dictionaries(NAMES, st.integers() | NAMES | st.lists(POSITIVE, max_size=2))
        )
    return values


@settings(max_examples=60)
@given(values=config_values())
def test_dumping_and_loading_changes_nothing(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    first, second = folder / "first.yaml", folder / "second.yaml"
    first.write_bytes(render(values).encode())
    config = load_config(first).config
    assert config == Config.model_validate(config.model_dump())
    second.write_bytes(dump_config(config).encode())
    assert load_config(second).config == config


# ---- Schema ----------------------------------------------------------------------------------


def test_schema_tells_an_editor_what_the_loader_tells() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(parse(GOOD, "").values)
    assert not validator.is_valid(parse(GOOD + "bogus: 1\n", "").values)
    assert not validator.is_valid(parse(good_with("256]", "256, 1]"), "").values)
    assert not validator.is_valid(parse(good_with("  volume: data/em\n", "  mip: 0\n"), "").values)
    assert schema["required"] == ["input", "model", "patch", "block", "output"]


def test_schema_documents_every_key_and_closes_every_section() -> None:
    schema = json.loads(json_schema())
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for field in section["properties"].values():
            assert "description" in field or "description" in schema["$defs"][field["$ref"][8:]]


def test_the_file_may_be_named_with_its_whole_path() -> None:
    path = Path(os.path.abspath("config.yaml"))
    path.write_text(GOOD + "bogus: 1\n")
    with pytest.raises(ConfigError, match=rf"^{path}:11: bogus: unknown key"):
        load_config(path)
