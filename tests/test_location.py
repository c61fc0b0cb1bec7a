"""How volumes and networks are named: relative paths, formats, one place under two spellings."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.config.location import (
    is_read_only,
    model_path_mistake,
    place,
    resolve_model_path,
    resolve_path,
    resolve_volume,
    split_model_path,
    volume_format,
)

BASE = "/configs/mine"


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("data/em", "/configs/mine/data/em"),
        ("data/em/", "/configs/mine/data/em/"),
        ("../data/em.h5", "/configs/data/em.h5"),
        ("./em.zarr", "/configs/mine/em.zarr"),
        ("/data/em", "/data/em"),
        ("file://data/em", "file:///configs/mine/data/em"),
        ("file:///data/em", "file:///data/em"),
        ("file://../em.zarr|zarr3:", "file:///configs/em.zarr|zarr3:"),
        ("file:///data/a%20b|zarr3:", "file:///data/a%20b|zarr3:"),
        ("file://a%23b|zarr3:in/it", "file:///configs/mine/a%23b|zarr3:in/it"),
        ("data/em|zarr2:", "file:///configs/mine/data/em|zarr2:"),
        ("/data/100%|zarr3:", "file:///data/100%25|zarr3:"),
        ("em.zip|zip:inside/|zarr3:", "file:///configs/mine/em.zip|zip:inside/|zarr3:"),
        ("precomputed://data/em", "precomputed:///configs/mine/data/em"),
        ("precomputed:///data/em", "precomputed:///data/em"),
        ("precomputed://file://data/em", "precomputed://file:///configs/mine/data/em"),
        ("precomputed://file:///data/100%", "precomputed://file:///data/100%"),
        ("precomputed://gs://bucket/em", "precomputed://gs://bucket/em"),
        ("zarr3://file://em", "zarr3://file:///configs/mine/em"),
        ("gs://bucket/em|zarr3:", "gs://bucket/em|zarr3:"),
        ("s3://bucket/em", "s3://bucket/em"),
        ("https://host/em", "https://host/em"),
        ("memory://em|zarr3:", "memory://em|zarr3:"),
        ("synthetic://membranes?shape=64,64,64", "synthetic://membranes?shape=64,64,64"),
    ],
)
def test_relative_paths_start_from_the_base_and_other_schemes_stay(
    written: str, resolved: str
) -> None:
    assert resolve_volume(written, BASE) == resolved
    assert resolve_volume(resolved, "/elsewhere") == resolved


@pytest.mark.parametrize(
    ("kvstore", "resolved"),
    [
        ({"driver": "file", "path": "em/"}, {"driver": "file", "path": "/configs/mine/em/"}),
        ({"driver": "gcs", "path": "em/"}, {"driver": "gcs", "path": "em/"}),
        ("file://em/", "file:///configs/mine/em/"),
        ("gs://bucket/em/", "gs://bucket/em/"),
        (
            {"driver": "zip", "path": "in/", "base": {"driver": "file", "path": "em.zip"}},
            {
                "driver": "zip",
                "path": "in/",
                "base": {"driver": "file", "path": "/configs/mine/em.zip"},
            },
        ),
        (
            {"driver": "zip", "base": "file://em.zip"},
            {"driver": "zip", "base": "file:///configs/mine/em.zip"},
        ),
    ],
)
def test_paths_inside_a_spec_are_resolved(kvstore: Any, resolved: Any) -> None:
    spec = {"driver": "zarr3", "path": "inner", "kvstore": kvstore}
    assert resolve_volume(spec, BASE) == spec | {"kvstore": resolved}


def test_layers_of_a_spec_are_resolved() -> None:
    layer = {"driver": "n5", "kvstore": {"driver": "file", "path": "a/"}}
    resolved = {"driver": "n5", "kvstore": {"driver": "file", "path": "/configs/mine/a/"}}
    spec = {"driver": "stack", "layers": [layer, "memory://x"]}
    assert resolve_volume(spec, BASE) == {"driver": "stack", "layers": [resolved, "memory://x"]}


def test_home_is_expanded_and_variables_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_path("~/em", BASE) == "/home/me/em"
    assert resolve_volume("~/em.zarr", BASE) == "/home/me/em.zarr"
    assert resolve_volume("file://~/em|zarr3:", BASE) == "file:///home/me/em|zarr3:"
    assert resolve_volume("precomputed://~/em", BASE) == "precomputed:///home/me/em"
    assert resolve_model_path("~/nets.py:Net", BASE) == "/home/me/nets.py:Net"
    assert resolve_path("$HOME/em", BASE) == "/configs/mine/$HOME/em"


def test_going_up_from_a_symbolic_link_leads_where_the_file_system_goes(tmp_path: Path) -> None:
    (tmp_path / "far/configs").mkdir(parents=True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near/configs").symlink_to(tmp_path / "far/configs")
    (tmp_path / "far/em").touch()
    resolved = resolve_path("../em", str(tmp_path / "near/configs"))
    assert Path(resolved).samefile(tmp_path / "far/em")
    assert resolve_path("../em", str(tmp_path / "far/configs")) == str(tmp_path / "far/em")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_resolving_twice_changes_nothing(written: str) -> None:
    resolved = resolve_volume(written, BASE)
    assert resolve_volume(resolved, "/elsewhere") == resolved


@pytest.mark.parametrize(
    ("volume", "name"),
    [
        ("precomputed://gs://bucket/em", "precomputed"),
        ("file:///em|neuroglancer-precomputed:", "precomputed"),
        ("file:///em|zarr3:", "zarr3"),
        ("file:///em.zip|zip:a/|zarr:", "zarr2"),
        ("file:///em|zarr2:sub", "zarr2"),
        ("file:///em|n5:", "n5"),
        ("file:///em|auto:", None),
        ("out/em.zarr", "zarr3"),
        ("out/em.zarr/", "zarr3"),
        ("em.H5", "hdf5"),
        ("em.n5", "n5"),
        ("em", None),
        ("synthetic://membranes?shape=1,1,1", "synthetic"),
        ({"driver": "zarr3", "kvstore": "file:///em"}, "zarr3"),
        ({"driver": "neuroglancer_precomputed"}, "precomputed"),
        ({"driver": "cast"}, None),
        ({}, None),
    ],
)
def test_format_that_the_text_tells(volume: Any, name: str | None) -> None:
    assert volume_format(volume) == name


@pytest.mark.parametrize(
    "other",
    [
        "/data/em/",
        "file:///data/em",
        "precomputed:///data/em",
        "precomputed://file:///data/em/",
        "file:///data/em|zarr3:",
        "file:///data/e%6D|zarr3:",
        "file:///data|zarr3:em",
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": "/data/em/"}},
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": "/data"}, "path": "em"},
        {"driver": "zarr3", "kvstore": "file:///data/em/"},
    ],
)
def test_one_place_under_two_spellings(other: Any) -> None:
    assert place(other) == place("/data/em")


@pytest.mark.parametrize("other", ["/data/em2", "gs://data/em", "/data/em/sub", {"driver": "n5"}])
def test_other_places(other: Any) -> None:
    assert place(other) != place("/data/em")


def test_what_can_only_be_read() -> None:
    assert is_read_only("synthetic://membranes?shape=1,1,1")
    assert is_read_only("https://host/em")
    assert is_read_only("precomputed://https://host/em")
    assert not is_read_only("precomputed://gs://bucket/em")
    assert not is_read_only({"driver": "zarr3"})


@pytest.mark.parametrize(
    ("path", "code", "resolved"),
    [
        ("net.pt", None, "/configs/mine/net.pt"),
        ("/nets/net.pt", None, "/nets/net.pt"),
        ("net:v2.pt", None, "/configs/mine/net:v2.pt"),
        ("nets/unet.py:UNet", ("nets/unet.py", "UNet"), "/configs/mine/nets/unet.py:UNet"),
        ("/nets/unet.py:UNet", ("/nets/unet.py", "UNet"), "/nets/unet.py:UNet"),
        ("my.package:UNet", ("my.package", "UNet"), "my.package:UNet"),
        ("package:make_net", ("package", "make_net"), "package:make_net"),
    ],
)
def test_networks_are_files_or_code(path: str, code: tuple[str, str] | None, resolved: str) -> None:
    assert split_model_path(path) == code
    assert model_path_mistake(path) is None
    assert resolve_model_path(path, BASE) == resolved


@pytest.mark.parametrize(
    ("path", "mistake"),
    [
        ("nets.py", "'nets.py' does not name the network in the file; write nets.py:Name"),
        ("nets.py:", "'nets.py:' does not name the network in the file; write nets.py:Name"),
        ("nets.py:9", "'nets.py:9' does not name the network in the file; write nets.py:Name"),
        (
            "net.pt:UNet",
            "'net.pt:UNet' names something in a saved network; only Python code takes `:Name`",
        ),
    ],
)
def test_mistakes_in_naming_a_network(path: str, mistake: str) -> None:
    assert model_path_mistake(path) == mistake
