"""Small configs, volumes and plans, drawn by hypothesis or written down in one line."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box, Triple, triple
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.plan.estimate import Estimate, estimate
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise


def make_config(patch: Triple, block: Triple, **more: Any) -> Config:
    """Return a config of the identity backend; keys of `more` are `section` or `section_key`."""
    sections: dict[str, Any] = {
        "input": {"volume": "memory://in"},
        "model": {"backend": "identity"},
        "patch": {"shape": patch},
        "block": {"shape": block},
        "output": {"volume": "memory://out"},
        "run_dir": "/runs/test",
    }
    for name, value in more.items():
        section, _, key = name.partition("_")
        if key:
            sections.setdefault(section, {})[key] = value
        else:
            sections[section] = value
    return Config.model_validate(sections)


def make_info(domain: Box, **more: Any) -> VolumeInfo:
    """Return what is known of a uint8 volume over `domain`."""
    facts: dict[str, Any] = {
        "location": "memory://in",
        "driver": "memory",
        "num_channels": 1,
        "dtype": np.dtype(np.uint8),
        "voxel_size": None,
    }
    return VolumeInfo(domain=domain, **(facts | more))


def triples(low: int, high: int) -> st.SearchStrategy[Triple]:
    """Draw three whole numbers of [low, high]."""
    number = st.integers(low, high)
    return st.tuples(number, number, number)


@st.composite
def boxes(draw: st.DrawFn, low: int = -9, high: int = 9, largest: int = 7) -> Box:
    """Draw a box, empty ones too."""
    return Box.from_shape(draw(triples(low, high)), draw(triples(0, largest)))


@st.composite
def axis_geometries(draw: st.DrawFn, largest: int) -> dict[str, int]:
    """Draw one axis of a config, its volume and its ROI; nothing fits anything, on purpose."""
    patch = draw(st.integers(1, 9))
    start = draw(st.integers(-20, 20))
    size = draw(st.integers(1, largest))
    roi_start = draw(st.integers(start, start + size - 1))
    return {
        "out": patch,
        "overlap": draw(st.integers(0, patch - 1)),
        "crop": draw(st.integers(0, 3)),
        "margin": draw(st.integers(0, patch)),
        "block": draw(st.integers(1, 14)),
        "start": start,
        "stop": start + size,
        "roi_start": roi_start,
        "roi_stop": draw(st.integers(roi_start + 1, start + size)),
    }


@st.composite
def cases(draw: st.DrawFn, largest: int = 40) -> tuple[Config, Box]:
    """Draw a config and the domain of its input."""
    axes = [draw(axis_geometries(largest)) for _ in range(3)]

    def each(key: str) -> Triple:
        return triple([axis[key] for axis in axes])

    more: dict[str, Any] = {"patch_overlap": each("overlap"), "patch_crop": each("crop")}
    if draw(st.booleans()):
        more["block_margin"] = each("margin")
    if draw(st.booleans()):
        more["roi"] = {"start": each("roi_start"), "stop": each("roi_stop")}
    more["block_stitch"] = draw(st.sampled_from(["crop", "seamless"]))
    more["output_domain"] = draw(st.sampled_from(["input", "roi"]))
    shape = triple([axis["out"] + 2 * axis["crop"] for axis in axes])
    config = make_config(shape, each("block"), **more)
    return config, Box(start=each("start"), stop=each("stop"))


def make_plan(config: Config, domain: Box | Triple) -> Plan:
    """Return the plan over a domain, or over a volume of this shape at the origin."""
    if not isinstance(domain, Box):
        domain = Box.from_shape((0, 0, 0), domain)
    return Plan.from_config(config, domain)


def estimate_of(config: Config, domain: Box | Triple, **more: Any) -> Estimate:
    """Return the estimate over a domain; keywords as of `Premise` or of `make_info`."""
    plan = make_plan(config, domain)
    told = {key: more.pop(key) for key in ("model_nbytes", "num_ranks", "probe") if key in more}
    info = make_info(plan.volume, **more)
    return estimate(Premise(plan=plan, config=config, info=info, **told))
