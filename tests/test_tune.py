"""Tuning: the order of trials, what is chosen and why, where speeds are known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mpichunk.backends.openvino.instructions import OPTION
from mpichunk.bench.figures import Spread
from mpichunk.config.schema import Config
from mpichunk.tune.figures import Difference, Largest, Row, difference, largest_batch, verdict
from mpichunk.tune.search import Search
from mpichunk.tune.variants import Facts, Variant, baseline, changed, variant_of, with_settings
from tests.geometries import make_config

CPU = Facts(
    device="cpu", installed=frozenset({"pytorch", "openvino", "onnxruntime"}), has_compiler=False
)
WIDE = replace(CPU, has_avx512=True)
CUDA = Facts(device="cuda:0", installed=frozenset({"pytorch", "openvino"}), has_compiler=True)


def config(
    backend: str = "pytorch", path: str | None = "/n.py:Net", size: int = 1, **more: Any
) -> Config:
    model = {"backend": backend, "path": path, **more.pop("model", {})}
    found = make_config((8, 8, 8), (16, 16, 16), model=model, **more)
    return with_settings(found, {"patch.batch_size": size})


def row(
    variant: Variant, speed: float, *, apart: float = 0.0, refused: str = "", **more: Any
) -> Row:
    if refused:
        return Row(variant=variant, refused=refused)
    return Row(
        variant=variant,
        seconds=Spread.of([1 / speed]),
        speedup=Spread.of([speed]),
        difference=Difference(largest=apart, mean=apart / 10),
        **more,
    )


def search(
    asked: Config, facts: Facts, speed: Callable[[Variant], float | str], *, tolerance: float = 1e-3
) -> tuple[Row, list[Row]]:
    """Search where speeds are known; a text is a refusal, and halves differ by 1e-2."""

    def measure(variant: Variant) -> Row:
        found = speed(variant)
        if isinstance(found, str):
            return row(variant, 0, refused=found)
        is_half = variant.precision in ("bfloat16", "float16")
        return row(variant, found, apart=1e-2 if is_half else 1e-5)

    trials = Search(asked, facts, measure, tolerance)
    return trials.run(), trials.rows


# ---- What is tried -------------------------------------------------------------------------------


def test_everything_that_the_machine_has_is_tried_once() -> None:
    best, rows = search(config(), CUDA, lambda variant: 1.0)
    names = [item.variant.name for item in rows]
    assert names[0] == "pytorch float32, batch 1"
    assert len(set(names)) == len(names)
    for precision in ("tf32", "bfloat16", "float16"):
        assert f"pytorch {precision} + channels_last, batch 1" in names
    for kernel in ("fold_batch_norm", "compile", "cuda_graphs"):
        assert f"pytorch float32 + {kernel}, batch 1" in names
    assert not any("openvino" in name for name in names), "the device is not its own"
    assert best is rows[0], "nothing is faster"


def test_on_a_cpu_other_backends_are_tried_and_what_needs_a_device_is_not() -> None:
    _, rows = search(config(), CPU, lambda variant: 1.0)
    names = " ".join(item.variant.name for item in rows)
    assert "openvino float32" in names and "openvino bfloat16" in names
    assert "tf32" not in names and "cuda_graphs" not in names and "compile" not in names
    none = replace(CPU, installed=frozenset({"pytorch"}))
    assert not any(
        item.variant.backend == "openvino" for item in search(config(), none, lambda v: 1.0)[1]
    )


@pytest.mark.parametrize(
    ("backend", "path", "expected"),
    [
        ("identity", "", {"identity"}),
        ("pznet", "/net", {"pznet"}),
        ("openvino", "/n.xml", {"openvino"}),
        ("onnxruntime", "/n.onnx", {"onnxruntime", "openvino"}),
        ("openvino", "/n.onnx", {"onnxruntime", "openvino"}),
        ("openvino", "/n.pt2", {"pytorch", "openvino"}),
    ],
)
def test_backends_are_those_that_take_the_file(backend: str, path: str, expected: set[str]) -> None:
    asked = config(backend, path or None)
    _, rows = search(asked, CPU, lambda variant: 1.0)
    assert {item.variant.backend for item in rows} == expected


def test_what_helps_only_together_is_found_and_kernels_add_up() -> None:
    def speed(variant: Variant) -> float:
        value = {"float32": 1.0, "tf32": 1.1, "bfloat16": 0.8, "float16": 1.2}[variant.precision]
        if variant.precision == "bfloat16" and "channels_last" in variant.kernels:
            value = 3.0
        if "cuda_graphs" in variant.kernels:
            value *= 1.5
        if "fold_batch_norm" in variant.kernels:
            value *= 1.01
        return value * min(variant.batch_size, 4) ** 0.5

    best, rows = search(config(), CUDA, speed, tolerance=0.1)
    assert best.variant.name == "pytorch bfloat16 + channels_last + cuda_graphs, batch 4"
    assert max(item.variant.batch_size for item in rows) == 16, "two larger ones are no faster"


def test_what_differs_too_much_is_never_chosen() -> None:
    def speed(variant: Variant) -> float:
        return 5.0 if variant.precision in ("bfloat16", "float16") else 1.0

    best, rows = search(config(), CUDA, speed, tolerance=1e-3)
    assert best.variant.precision == "float32"
    fast = next(item for item in rows if item.variant.precision == "bfloat16")
    assert verdict(fast, best, 1e-3) == "refused: differs by 1.0e-02, 0.001 is allowed"
    assert search(config(), CUDA, speed, tolerance=0.1)[0].variant.precision == "bfloat16"


def test_openvino_is_tried_without_avx512_and_then_in_batches() -> None:
    def speed(variant: Variant) -> float:
        fast = 2.0 if variant.backend == "openvino" else 1.0
        wide = 1.4 if variant.instructions == "AVX2" else 1.0
        return fast * wide * min(variant.batch_size, 2)

    best, rows = search(config(), WIDE, speed)
    narrow = [item.variant.name for item in rows if item.variant.instructions]
    assert narrow[0] == "openvino float32 + AVX2 at most, batch 1", "halves have no AVX2"
    assert narrow[1:] == [f"openvino float32 + AVX2 at most, batch {n}" for n in (2, 4, 8)]
    assert best.variant.name == narrow[1]
    # Nor on top of what does not run, where there is nothing wider, or a second time.
    _, rows = search(config(), WIDE, lambda v: "no" if v.backend == "openvino" else 1.0)
    assert not any(item.variant.instructions for item in rows)
    assert not any(item.variant.instructions for item in search(config(), CPU, speed)[1])
    asked = config("openvino", model={"options": {OPTION: "AVX2"}})
    names = [item.variant.name for item in search(asked, WIDE, lambda variant: 1.0)[1]]
    assert names.count("openvino float32 + AVX2 at most, batch 1") == 1
    assert "openvino float32, batch 1" in names and "openvino bfloat16, batch 1" in names


def test_refusals_end_a_series_and_nothing_else() -> None:
    def speed(variant: Variant) -> float | str:
        return "no room" if variant.batch_size > 2 else float(variant.batch_size)

    best, rows = search(config(), CUDA, speed)
    assert best.variant.batch_size == 2
    assert [item.variant.batch_size for item in rows if item.refused] == [4]
    _, rows = search(config(), CPU, lambda v: "no" if v.precision == "bfloat16" else 1.0)
    assert any(item.variant.precision == "float16" for item in rows if not item.refused)


def test_batches_smaller_than_the_config_says_are_tried_too() -> None:
    asked = config(size=6)
    best, _ = search(asked, CPU, lambda variant: 1 / variant.batch_size)
    assert best.variant.batch_size == 1


# ---- What it means -------------------------------------------------------------------------------


def test_differences_are_shares_of_the_range() -> None:
    expected = np.array([[-1.0, 3.0]], np.float32)
    assert difference(expected + np.float32(0.5), expected).largest == pytest.approx(0.125)
    assert difference(expected, expected) == Difference(largest=0.0, mean=0.0)
    assert difference(expected * np.nan, expected).largest == float("inf")


def test_verdicts() -> None:
    start = baseline(config())
    best = row(start, 2.0)
    assert verdict(best, best, 1e-3) == "the best"
    assert verdict(row(start, 1.0), best, 1e-3) == "slower than the best by 2.00"
    assert verdict(row(start, 1.99), best, 1e-3) == "as fast as the best"
    assert "faster by 2.0% only" in verdict(row(start, 2.04), best, 1e-3)
    assert "NaN" in verdict(row(start, 3.0, apart=float("inf")), best, 1e-3)
    assert verdict(row(start, 0, refused="no room"), best, 1e-3) == "refused: no room"


def largest(
    available: int | None, fitting: int, *, sizes: Sequence[int] = (2, 4)
) -> tuple[Largest | None, list[int]]:
    """Return what is found where 100 bytes a patch were measured and so many fit; what was run."""
    start, run = baseline(config()), []
    rows = [row(replace(start, batch_size=n), 1.0, nbytes=1000 + 100 * n) for n in sizes]

    def is_fitting(size: int) -> bool:
        run.append(size)
        return size <= fitting

    return largest_batch(rows, available, is_fitting), run


def test_largest_batch_is_extrapolated_and_then_run() -> None:
    assert largest(2000, 8) == (Largest(num_patches=8, is_run=True), [8])
    # Larger ones take more than they should: back to what was measured by halves.
    assert largest(3000, 5) == (Largest(num_patches=5, is_run=True), [17, 10, 7, 5])
    assert largest(3000, 4) == (Largest(num_patches=4, is_run=True), [17, 10, 7, 5])
    assert largest(1560, 4) == (Largest(num_patches=4, is_run=True), [])
    assert largest(10**9, 99) == (Largest(num_patches=64, is_run=True), [64])
    assert largest(2000, 9, sizes=[2]) == (None, [])
    assert largest(None, 9) == (None, [])
    assert largest(2000, 9, sizes=[]) == (None, [])


def test_a_largest_batch_that_was_not_run_is_told_as_such() -> None:
    start = baseline(config())
    rows = [row(replace(start, batch_size=n), 1.0, nbytes=1000 + 100 * n) for n in (2, 4)]
    found = largest_batch(rows, 2000, lambda size: None)
    assert found == Largest(num_patches=8, is_run=False)


def test_only_what_differs_from_the_config_is_to_be_changed() -> None:
    asked = config(compute={"precision": "bfloat16", "channels_last": True})
    settings = baseline(asked).settings
    assert changed(asked, settings) == {
        "compute.precision": "float32",
        "compute.channels_last": False,
    }
    assert changed(asked, variant_of(asked).settings) == {}
    assert variant_of(with_settings(asked, settings)) == baseline(asked)


def test_options_of_another_backend_are_left_behind() -> None:
    options = {"NUM_STREAMS": 1, "weights_key": "ema"}
    asked = config("openvino", model={"options": options})
    assert with_settings(asked, {"model.backend": "pytorch"}).model.options == {
        "weights_key": "ema"
    }
    hinted = config("openvino", model={"options": {"INFERENCE_PRECISION_HINT": "f32"}})
    found = with_settings(hinted, {"compute.precision": "bfloat16"})
    assert (found.compute.precision, found.model.options) == ("bfloat16", {})


def test_narrower_instructions_are_one_option_beside_the_users() -> None:
    options = {"NUM_STREAMS": 1, "weights_key": "ema"}
    limited = Variant(backend="openvino", batch_size=1, instructions="AVX2")
    for backend, kept in (("openvino", options), ("pytorch", {"weights_key": "ema"})):
        asked = config(backend, model={"options": options})
        found = with_settings(asked, limited.settings)
        assert found.model.options == {**kept, OPTION: "AVX2"}
        assert variant_of(found) == limited
        changes = changed(asked, limited.settings)
        assert changes.pop("model.options") == found.model.options
        assert changes == ({} if backend == "openvino" else {"model.backend": "openvino"})
        assert changed(found, limited.settings) == {}
        assert with_settings(asked, changed(asked, limited.settings)) == found
        # And back.
        assert changed(found, replace(limited, instructions=None).settings) == {
            "model.options": kept
        }
    # A word of openvino's only.
    odd = config("pytorch", model={"options": {OPTION: "AVX2"}})
    assert variant_of(odd).instructions is None
