"""Bad models and what networks must not return: which key, which words."""

import json
import re

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from mpichunk.backends import get_backend
from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.backends.shapes.size_advice import shape_advice, size_advice
from mpichunk.block.inference import check_engine
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError
from mpichunk.geometry.box import triple
from tests.modelfolder import load, make_request, pytorch, write_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("nets"))


# ---- Bad models: which key, which words --------------------------------------------------------

TINY = "net.py:Tiny"
BAD_MODELS = [
    # path, weights, arguments, key, words of the message
    (None, None, {}, "model.path", ["needs model.path", "TorchScript"]),
    ("absent.pt", None, {}, "model.path", ["absent.pt", "does not exist"]),
    ("absent.py:Net", None, {}, "model.path", ["absent.py", "does not exist"]),
    (".", None, {}, "model.path", ["is a directory"]),
    ("net.py", None, {}, "model.path", ["net.py:Name"]),
    ("text.pt", None, {}, "model.path", ["text.pt", "not a TorchScript file"]),
    ("empty.pt", None, {}, "model.path", ["not a TorchScript file"]),
    ("cut_script.pt", None, {}, "model.path", ["cut short"]),
    ("plain.pt", None, {}, "model.path", ["checkpoint", "model.weights"]),
    ("plain.safetensors", None, {}, "model.path", ["weights only", "model.weights"]),
    ("program.pt2", None, {}, "patch.shape", ["patches of [4, 4, 4] only", "dynamic axes"]),
    ("net.onnx", None, {}, "model.path", ["not a network of torch", "onnxruntime or openvino"]),
    (
        "net.py:Tinny",
        "plain.pt",
        {},
        "model.path",
        ["no network 'Tinny'", "Tiny", "factory"],
    ),
    (
        "nothing.py:Net",
        None,
        {},
        "model.path",
        ["no network 'Net'", "neither a class nor a function"],
    ),
    ("needs_missing.py:Net", None, {}, "model.path", ["needs_missing.py:3", "no_such_package"]),
    ("broken.py:Net", None, {}, "model.path", ["broken.py:1", "SyntaxError"]),
    ("exits.py:Net", None, {}, "model.path", ["SystemExit"]),
    ("net.py:not_a_network", None, {}, "model.path", ["returns a int", "torch.nn.Module"]),
    ("net.py:failing", None, {}, "model.arguments", ["net.py:", "my_weights.bin"]),
    (TINY, "plain.pt", {"widht": 3}, "model.arguments", ["widht"]),
    (TINY, "absent.pt", {}, "model.weights", ["absent.pt", "does not exist"]),
    (TINY, "text.pt", {}, "model.weights", ["text.pt", "not a checkpoint"]),
    (TINY, "empty.pt", {}, "model.weights", ["empty.pt", "no readable weights"]),
    (TINY, "cut.pt", {}, "model.weights", ["cut.pt", "no readable weights"]),
    (TINY, "bad.safetensors", {}, "model.weights", ["bad.safetensors", "no readable weights"]),
    (TINY, "script.pt", {}, "model.weights", ["TorchScript belongs in model.path"]),
    (TINY, "code.pt", {}, "model.weights", ["code.pt", "would run print"]),
    (TINY, "plain_pickle.pt", {}, "model.weights", ["would run print"]),
    (TINY, "whole_module.pt", {}, "model.weights", ["would run torch.nn.modules.linear.Linear"]),
    (
        TINY,
        "missing.pt",
        {},
        "model.weights",
        ["1 name of the network is missing, first 'last.bias'"],
    ),
    (TINY, "unexpected.pt", {}, "model.weights", ["unknown to it, first 'renamed.weight'"]),
    (TINY, "plain.pt", {"width": 3}, "model.weights", ["(2, 1, 3, 3, 3), expected (3, 1,"]),
    (TINY, "no_tensors.pt", {}, "model.weights", ["keys optimizer, epoch", "state_dict"]),
    (TINY, "list.pt", {}, "model.weights", ["holds a list"]),
    ("script.pt", None, {"width": 3}, "model.arguments", ["remove model.arguments"]),
]


@pytest.mark.parametrize(("path", "weights", "arguments", "key", "words"), BAD_MODELS)
def test_bad_model_is_one_message_with_its_key(folder, capfd, path, weights, arguments, key, words):
    model = Model.model_construct(
        backend="pytorch",
        path=path and str(folder / path),
        weights=weights and str(folder / weights),
        arguments=arguments,
    )
    with pytest.raises(ModelError) as caught:
        load(model)
    message = str(caught.value)
    assert caught.value.key == key, message
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "ran code" not in "".join(capfd.readouterr())


def test_a_network_without_weights_is_refused_when_its_values_are_random(folder):
    with pytest.raises(ModelError, match="are random") as caught:
        load(pytorch(folder / TINY))
    assert caught.value.key == "model.weights"
    load(pytorch(folder / "net.py:Half"))  # has none to set


def test_missing_files_are_told_before_torch_is_imported(folder):
    for model in (
        pytorch(folder / "absent.pt"),
        pytorch(folder / TINY, weights=str(folder / "absent.pt")),
    ):
        with pytest.raises(ModelError, match="does not exist"):
            get_backend("pytorch").model_files(model)


# ---- What networks return ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tuple", "list", "dict", "double"])
def test_the_only_tensor_is_taken(folder, what):
    engine = load(pytorch(folder / "net.py:Returns", arguments={"what": what}), crop=(1, 2, 3))
    batch = torch.rand(1, 1, 8, 12, 16)
    found = engine.infer(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, batch[:, :, 1:-1, 2:-2, 3:-3])


BAD_OUTPUTS = [
    ("Returns", {"what": "two"}, {}, "model.path", ["a tuple with 2 tensors", "wrap it"]),
    ("Returns", {"what": "none"}, {}, "model.path", ["a NoneType"]),
    ("Returns", {"what": "text"}, {}, "model.path", ["a str"]),
    ("Returns", {"what": "flat"}, {}, "model.path", ["shape (1, 8, 12, 16)", "(1, 1, z, y, x)"]),
    ("Returns", {"what": "error"}, {}, "model.path", ["net.py:", "KeyError", "no such layer"]),
    ("Returns", {"what": "nan"}, {}, "model.weights", ["NaN or inf"]),
    (
        "Returns",
        {"what": "stretched"},
        {"out_channels": 2},
        "model.out_channels",
        ["returned 3 channels", "is 2", "set it to 3"],
    ),
    ("Lossy", {}, {}, "patch.crop", ["(4, 8, 12)", "set patch.crop: [2, 2, 2]"]),
    ("Lossy", {}, {"crop": (1, 2, 2)}, "patch.crop", ["[1, 2, 2]", "set patch.crop: [2, 2, 2]"]),
    ("Odd", {}, {}, "patch.crop", ["(7, 12, 16)", "no patch.crop fits"]),
    # A size that it does not take is no border to be cut: the crop is right as it is.
    (
        "Pooled",
        {},
        {"patch_shape": (5, 18, 16)},
        "patch.shape",
        ["(5, 16, 16)", "multiples of [1, 4, 4]", "set patch.shape: [5, 16, 16] or [5, 20, 16]"],
    ),
    (
        "Pooled",
        {},
        {"patch_shape": (5, 18, 16), "crop": (2, 2, 1)},
        "patch.shape",
        ["multiples of [1, 4, 4]", "set patch.shape: [5, 16, 16] or [5, 20, 16]$"],
    ),
    (
        "Half",
        {},
        {"patch_shape": (5, 18, 16)},
        "patch.shape",
        ["multiples of [1, 4, 4]", "[5, 16, 16] or [5, 20, 16]"],
    ),
]


@pytest.mark.parametrize(("name", "arguments", "changes", "key", "words"), BAD_OUTPUTS)
def test_bad_output_is_found_before_any_block(folder, name, arguments, changes, key, words):
    model = pytorch(f"{folder / 'net.py'}:{name}", arguments=arguments)
    with pytest.raises(ModelError) as caught:
        check_engine(load(model, **changes), make_request(**changes))
    message = str(caught.value)
    assert caught.value.key == key, message
    assert all(word in f"{message}$" for word in words), message
    assert "\n" not in message


def test_wrong_number_of_input_channels_is_named(folder):
    request = make_request(in_channels=2)
    for path, weights in ((TINY, str(folder / "plain.pt")), ("script.pt", None)):
        engine = load(pytorch(folder / path, weights=weights), in_channels=2)
        with pytest.raises(ModelError, match="takes 1 input channel, but the input has 2"):
            check_engine(engine, request)


def test_memory_and_determinism_have_their_own_keys():
    engine = TorchEngine(nn.Identity(), make_request())
    error = engine.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"))
    assert error.key == "patch.batch_size" and "out of memory" in str(error)
    error = engine.explain(
        RuntimeError("max_pool does not have a deterministic implementation, but you set ...")
    )
    assert error.key == "compute.deterministic"


def test_a_network_that_has_cut_its_border_is_taken_as_it_is(folder):
    engine = load(pytorch(folder / "net.py:Lossy"), crop=(2, 2, 2))
    batch = torch.rand(1, 1, 8, 12, 16)
    torch.testing.assert_close(engine.infer(batch), batch[:, :, 2:-2, 2:-2, 2:-2])


@pytest.mark.parametrize(
    ("crop", "key"), [((0, 0, 0), "patch.crop"), ((21, 21, 21), "patch.shape")]
)
def test_real_valid_network_names_its_crop_and_the_sizes_without_a_shift(real_data, crop, key):
    # Of 52 voxels it drops the last two: a crop of 22 would fit the numbers and shift the image.
    model = pytorch(real_data / "nets" / "em_affinity_resunet_valid.ts.pt")
    changes = {"patch_shape": (52, 50, 53), "out_channels": 3, "crop": crop}
    with pytest.raises(ModelError) as caught:
        check_engine(load(model, **changes), make_request(**changes))
    assert caught.value.key == key
    message = str(caught.value)
    assert "set patch.shape: [50, 50, 50] or [54, 50, 54]" in message
    assert ("and patch.crop: [21, 21, 21]" in message) == (key == "patch.crop")


def test_real_same_network_names_its_multiples(real_data):
    model = pytorch(real_data / "nets" / "em_affinity_resunet_same.ts.pt")
    changes = {"patch_shape": (20, 30, 32), "out_channels": 3}
    with pytest.raises(ModelError) as caught:
        check_engine(load(model, **changes), make_request(**changes))
    assert caught.value.key == "patch.shape"
    assert "takes multiples of [4, 4, 4]" in str(caught.value)
    assert "[20, 28, 32] or [20, 32, 32]" in str(caught.value)


@pytest.mark.parametrize(
    ("multiples", "remainders", "shape", "words"),
    [
        ((1, 16, 16), (0, 0, 0), (20, 250, 256), "to [20, 240, 256] or [20, 256, 256]"),
        ((4, 4, 4), (2, 2, 2), (64, 66, 66), "to [62, 66, 66] or [66, 66, 66]"),
        ((8, 8, 8), (0, 0, 0), (4, 8, 8), "to [8, 8, 8]"),
        ((64, 64, 64), (0, 0, 0), (65, 65, 65), ""),
    ],
)
def test_size_advice(multiples, remainders, shape, words):
    tried = []

    def accepts(candidate):
        tried.append(candidate)
        return all(n % m == r for n, m, r in zip(candidate, multiples, remainders, strict=True))

    advice = size_advice(accepts, shape)
    if words:
        assert advice.endswith(words), advice
    assert len(tried) <= 26 and max(max(t) for t in tried) <= 64 + 7 + 32
    assert not size_advice(lambda _: False, shape)
    assert not size_advice(lambda _: True, shape)


@given(
    multiples=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16, 32])] * 3),
    border=st.tuples(*[st.integers(0, 40)] * 3),
    more=st.tuples(*[st.integers(1, 300)] * 3),
    remainder=st.integers(0, 31),
    is_cropped=st.booleans(),
)
# Not a power of two: no smaller patch stands for this one.
@example(multiples=(6, 3, 12), border=(9, 9, 9), more=(94, 95, 96), remainder=2, is_cropped=True)
def test_shape_advice_names_the_nearest_sizes_that_lose_the_border_only(
    multiples, border, more, remainder, is_cropped
):
    remainders = [remainder % m for m in multiples]
    least = [2 * b + m for b, m in zip(border, multiples, strict=True)]
    shape = triple([n + m for n, m in zip(least, more, strict=True)])
    tried = []

    def returned(candidate):
        """Cut the border, and drop what does not fill a whole step."""
        tried.append(candidate)
        axes = zip(candidate, border, multiples, remainders, strict=True)
        return triple([n - 2 * b - (n - r) % m for n, b, m, r in axes])

    def is_good(candidate):
        return all(
            (n - r) % m == 0 for n, r, m in zip(candidate, remainders, multiples, strict=True)
        )

    found = returned(shape)
    assume(found != shape)
    # Without a border any crop is right, and stays.
    has_border = any(border)
    crop = border if is_cropped and has_border else (50, 50, 50) if has_border else (0, 0, 1)
    is_cropped = is_cropped or not has_border
    advice = shape_advice(returned, shape, found, crop)
    # The patch, one that stands for it, the shorter ones, and one far from them.
    assert len(tried) <= 2 + 32 + 1
    named = [json.loads(text) for text in re.findall(r"\[[\d, ]+\]", advice.words)]
    if is_good(shape):
        assert (advice.key, named) == ("patch.crop", [list(border)])
        return
    assert advice.key == ("patch.shape" if is_cropped else "patch.crop")
    assert is_cropped or named.pop() == list(border)
    below = [n - (n - r) % m for n, r, m in zip(shape, remainders, multiples, strict=True)]
    sizes = named[2 if any(n % m for n, m in zip(below, multiples, strict=True)) else 1 :]
    above = [n + (r - n) % m for n, r, m in zip(shape, remainders, multiples, strict=True)]
    assert sizes == [n for n in (below, above) if has_border or n[2] > 2]


@pytest.mark.parametrize("shape", [(16, 32, 32), (21, 21, 21), (20, 21, 40)])
@pytest.mark.parametrize("crop", [(0, 0, 0), (1, 2, 2)])
@pytest.mark.parametrize(
    "net", [nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(8), nn.Upsample(scale_factor=2)]
)
def test_another_scale_is_no_border(net, shape, crop):
    # A crop that fits the numbers of this size would put values of other places where it is cut.
    engine = TorchEngine(net, make_request(patch_shape=shape, crop=crop))
    with pytest.raises(ModelError, match=r"; no patch\.crop fits that$") as caught:
        engine.infer(torch.zeros(1, 1, *shape))
    assert caught.value.key == "patch.crop"


@given(
    scale=st.tuples(
        *[st.sampled_from([(1, 2), (1, 3), (3, 4), (15, 16), (1, 1), (0, 1), (2, 1)])] * 3
    ),
    more=st.tuples(*[st.integers(-20, 20)] * 3),
    shape=st.tuples(*[st.integers(4, 200)] * 3),
    least=st.sampled_from([0, 4, 32]),
)
def test_no_crop_is_named_for_another_scale(scale, more, shape, least):
    def returned(candidate):
        axes = zip(candidate, scale, more, strict=True)
        made = [n * up // down + (up == 0) * 30 + extra for n, (up, down), extra in axes]
        return triple(made) if min(made) > 0 and min(candidate) >= least else None

    found = returned(shape)
    assume(found is not None and found != shape)
    advice = shape_advice(returned, shape, found, (3, 3, 3))
    is_border = all(s == (1, 1) and m <= 0 and m % 2 == 0 for s, m in zip(scale, more, strict=True))
    if is_border:
        assert advice.words.startswith(f"set patch.crop: {[-m // 2 for m in more]}")
    else:
        assert advice.words == "no patch.crop fits that"


def test_trying_other_sizes_ends_early_where_the_output_is_always_the_same():
    tried = []

    def returned(candidate):
        tried.append(candidate)
        return 8, 8, 8

    shape_advice(returned, (64, 128, 128), (8, 8, 8), (0, 0, 0))
    assert len(tried) == 1


def test_trying_other_sizes_takes_no_longer_than_some_seconds():
    # A step of 48 is more than what is tried, and each try takes its time.
    now = [0.0]

    def returned(candidate):
        now[0] += 3
        return triple([n // 48 * 48 for n in candidate])

    shape = 191, 191, 191
    advice = shape_advice(returned, shape, returned(shape), (0, 0, 0), clock=lambda: now[0])
    assert now[0] <= 3 + 10 + 3
    assert "no patch.crop fits that, as far as" in advice.words


def test_a_network_of_a_single_size_is_told_a_crop_with_its_condition():
    advice = shape_advice(lambda _: None, (8, 16, 16), (6, 12, 12), (0, 0, 0))
    assert advice.words.startswith("set patch.crop: [1, 2, 2]; right if the network cuts off")


@given(
    multiples=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16, 32])] * 3),
    shape=st.tuples(*[st.integers(40, 200)] * 3),
)
@example(multiples=(2, 4, 8), shape=(70, 100, 133))
def test_what_rounds_sizes_up_is_advised_the_nearest_on_each_axis(multiples, shape):
    def returned(candidate):
        return triple([-(-n // m) * m for n, m in zip(candidate, multiples, strict=True)])

    assume(returned(shape) != shape)
    advice = shape_advice(returned, shape, returned(shape), (0, 0, 0))
    named = [json.loads(text) for text in re.findall(r"\[[\d, ]+\]", advice.words)]
    below = [n // m * m for n, m in zip(shape, multiples, strict=True)]
    assert (advice.key, named[1:]) == ("patch.shape", [below, list(returned(shape))])
