"""Public checkpoints as a whole: every pair of formats, what shapes show, adaptation, and files that are none."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file
from written import save_weights

from common import architectures, checkpoints, names
from common import weights as canonical
from common.architectures.resnet import CONVENTIONS, VARIANTS, ResNetSpec
from common.checkpoints import Checkpoint, Origin, containers, inference
from common.checkpoints.canonical import metadata_of
from common.checkpoints.containers import pytorch
from common.errors import CheckpointError, SpecError, WeightsError
from common.images import PRESETS

BOTTLENECK = ResNetSpec(block="bottleneck", blocks=(1, 2), widths=(4, 8), stem_width=4, classes=5)
BASIC = ResNetSpec(block="basic", blocks=(2, 1), widths=(4, 8), stem_width=4, classes=7, in_channels=1)
KERAS = BOTTLENECK.replace(**CONVENTIONS["keras_applications"])
# What a format is called, and the end of its file's name.
WRITTEN_HERE = [
    ("canonical", "w.safetensors"),
    ("torchvision", "w.pth"),
    ("torchvision", "w.safetensors"),
    ("huggingface", "w.safetensors"),
    ("huggingface", "w.bin"),
    ("keras_applications", "w.weights.h5"),
    ("keras_applications", "w.h5"),
    ("keras_classic", "w.weights.h5"),
    ("keras_classic", "w.h5"),
    ("flax", "w.msgpack"),
]
# Written by the framework itself, in a process of its own.
WRITTEN_BY_FRAMEWORKS = [("keras_applications", "w.keras"), ("keras_classic", "w.keras"), ("flax", "folder")]
EVERY = [*WRITTEN_HERE, *WRITTEN_BY_FRAMEWORKS]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def written(folder, format_, spec, weights):
    name, file = format_
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / file, spec, weights, name)
    return folder / file


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A file of every format, of one network's weights, each read once."""
    folder = tmp_path_factory.mktemp("given")
    weights = canonical.randomize(BOTTLENECK, dtype="float32")
    paths = {
        format_: written(folder / str(number), format_, BOTTLENECK, weights) for number, format_ in enumerate(EVERY)
    }
    return weights, paths


@pytest.mark.parametrize("format_", EVERY, ids=":".join)
def test_a_file_says_what_it_is_by_its_content(given, format_, tmp_path):
    weights, paths = given
    renamed = paths[format_].rename(paths[format_].with_name("no-ending"))
    try:
        found = checkpoints.read(renamed)
        same(dict(found.weights), weights)
    finally:
        renamed.rename(paths[format_])
    assert found.origin.format == format_[0].partition(":")[0]


MORE = [pytest.param(BASIC, marks=pytest.mark.long), pytest.param(KERAS, marks=pytest.mark.long)]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [BOTTLENECK, *MORE], ids=["bottleneck", "basic", "biases"])
@pytest.mark.parametrize(("a", "b"), list(product(WRITTEN_HERE, WRITTEN_HERE)), ids=":".join)
def test_a_to_b_to_a_is_bitwise(tmp_path, a, b, spec):
    weights = canonical.randomize(spec, dtype="float32")
    first = checkpoints.read(written(tmp_path / "a", a, spec, weights))
    second = checkpoints.read(written(tmp_path / "b", b, first.spec, first.weights))
    third = checkpoints.read(written(tmp_path / "c", a, second.spec, second.weights))
    same(dict(third.weights), weights)
    assert canonical.digest(first.weights) == canonical.digest(second.weights) == canonical.digest(third.weights)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("format_", WRITTEN_HERE, ids=":".join)
def test_other_types_come_back_bitwise(tmp_path, format_, dtype):
    weights = canonical.randomize(BOTTLENECK, dtype=dtype)
    same(dict(checkpoints.read(written(tmp_path, format_, BOTTLENECK, weights)).weights), weights)


# Each into the next, and back into the first; a framework takes seconds to write one.
CYCLE = list(zip(WRITTEN_BY_FRAMEWORKS, [*WRITTEN_BY_FRAMEWORKS[1:], WRITTEN_BY_FRAMEWORKS[0]], strict=True))
PAIRS = [
    pytest.param(a, b, marks=[pytest.mark.long] if a in WRITTEN_BY_FRAMEWORKS and (a, b) not in CYCLE else [])
    for a, b in product(EVERY, WRITTEN_BY_FRAMEWORKS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=":".join)
def test_pairs_with_what_frameworks_write_are_bitwise(given, a, b, tmp_path):
    """Both ways: `b` was written from canonical weights, bitwise those that `a` holds, and is written as `a` here."""
    weights, paths = given
    same(dict(checkpoints.read(paths[a]).weights), weights)
    second = checkpoints.read(paths[b])
    third = checkpoints.read(written(tmp_path, a, second.spec, second.weights))
    same(dict(third.weights), weights)


def native(spec, naming):
    """What a file in a naming would show of a spec, without any values."""
    shapes = canonical.shapes(spec)
    tensors = naming.tensors(spec, lambda name: np.broadcast_to(np.float32(0), shapes[name]))
    return {key: containers.stored(get()) for key, get in tensors.items()}


# Those that every community has names for, and that names or a convention show; test_resnet_forms.py has the others.
ORDINARY = [
    name
    for name, spec in VARIANTS.items()
    if name.partition(".")[2] in ("", *CONVENTIONS) and not (spec.squeeze or spec.deep_stem or spec.shortcut == "none")
]


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["torchvision", "huggingface", "keras_applications", "keras_classic", "flax"])
@pytest.mark.parametrize("variant", ORDINARY)
def test_names_and_shapes_show_every_named_network(variant, naming):
    spec = VARIANTS[variant]
    tensors = native(spec, names.find("resnet", naming))
    convention = variant.partition(".")[2] or "torchvision"
    found = inference.infer(containers.Source(container="test", tensors=tensors), convention)
    assert (found.spec, found.naming.name) == (spec, naming)
    assert {"stride_in", "stem_padding"} <= set(found.assumed)


def test_a_convention_and_single_fields_can_be_set(tmp_path):
    path = written(tmp_path, ("torchvision", "w.pth"), BOTTLENECK, canonical.randomize(BOTTLENECK))
    assert checkpoints.read(path).spec == BOTTLENECK
    assert checkpoints.read(path, convention="paper").spec == BOTTLENECK.replace(**CONVENTIONS["paper"])
    found = checkpoints.read(path, convention="paper", changes={"stride_in": "conv2", "bn_eps": 1e-3})
    assert found.spec == BOTTLENECK.replace(pool_padding="ceil", bn_eps=1e-3)
    assert "bn_eps" not in found.origin.assumed
    assert found.origin.assumed["pool_padding"] == "ceil"
    with pytest.raises(SpecError, match="unknown convention 'caffe2'; expected one of torchvision, paper"):
        checkpoints.read(path, convention="caffe2")
    with pytest.raises(CheckpointError, match="unknown field 'stride'"):
        checkpoints.read(path, changes={"stride": 1})
    with pytest.raises(CheckpointError, match=r"fc.weight has shape \(5, 32\)"):
        checkpoints.read(path, changes={"classes": 4})


def test_another_number_of_classes_makes_a_new_head_and_says_so(tmp_path):
    weights = canonical.randomize(BOTTLENECK, dtype="float32")
    path = written(tmp_path, ("torchvision", "w.pth"), BOTTLENECK, weights)
    found = checkpoints.read(path, classes=3)
    assert found.spec == BOTTLENECK.replace(classes=3)
    canonical.validate(found.spec, found.weights)
    head = [name for name in weights if name.startswith("head.")]
    assert "initialised anew for 3 classes instead of 5" in found.origin.notes[-1]
    for name in weights:
        assert (found.weights[name].shape == weights[name].shape) == (name not in head)
        if name not in head:
            assert found.weights[name].tobytes() == weights[name].tobytes()
    assert found.weights["head.fc.kernel"].std() > 0
    assert checkpoints.read(path, classes=5).origin.notes == checkpoints.read(path).origin.notes


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_the_stem_takes_another_number_of_channels_and_says_so(tmp_path, channels):
    weights = canonical.randomize(BOTTLENECK, dtype="float64")
    path = written(tmp_path, ("torchvision", "w.pth"), BOTTLENECK, weights)
    found = checkpoints.read(path, in_channels=channels)
    canonical.validate(found.spec, found.weights)
    before, after = weights["stem.conv.kernel"], found.weights["stem.conv.kernel"]
    if channels == 1:
        assert np.array_equal(after, before.sum(2, keepdims=True))
    else:
        for channel in range(channels):
            assert np.array_equal(after[:, :, channel], before[:, :, channel % 3] * (3 / channels))
    assert f"for {channels}" in found.origin.notes[-1]


def test_tensors_that_are_missing_or_belong_nowhere_are_listed(tmp_path):
    weights = canonical.randomize(BOTTLENECK)
    path = written(tmp_path, ("torchvision", "w.pth"), BOTTLENECK, weights)
    tensors = dict(containers.container_of(path).read(path).tensors)
    source = containers.Source(container="test", tensors=tensors | {"extra.weight": tensors["fc.weight"]})
    with pytest.raises(CheckpointError, match=r"unexpected extra\.weight"):
        inference.infer(source)
    del tensors["layer2.1.bn2.bias"], tensors["bn1.running_var"]
    with pytest.raises(CheckpointError, match=r"missing bn1\.running_var, layer2\.1\.bn2\.bias"):
        inference.infer(containers.Source(container="test", tensors=tensors))


def test_what_no_format_is_for_is_refused(tmp_path):
    weights = canonical.randomize(BOTTLENECK)
    for name, to, message in [
        ("w.pth", "torchvision:legacy", "unknown format 'torchvision:legacy'; expected one of canonical, torchvision"),
        ("w.safetensors", "torchvision:legacy", "unknown format 'torchvision:legacy'"),
        ("w.pth", "onnx", "unknown format 'onnx'; expected one of canonical, torchvision"),
        ("w.onnx", None, "no format goes by '.onnx'"),
        ("w.pth", "flax", "flax does not go into such a file; expected torchvision or timm or huggingface"),
        ("w.msgpack", "keras_classic", "keras_classic does not go into such a file; expected flax"),
        ("no/w.pth", None, "cannot be written"),
    ]:
        with pytest.raises(WeightsError) as caught:
            save_weights(tmp_path / name, BOTTLENECK, weights, to)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"x", b"PK\x03\x04", b"\x80\x02.", b"\x89HDF\r\n\x1a\n", b"{}", b"\x81\xa1a\x01", bytes(1000)]
)
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, content):
    path = tmp_path / "w"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_places_that_are_no_checkpoint_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in [(tmp_path / "none", "there is no such file"), (tmp_path / "empty", "not a checkpoint")]:
        with pytest.raises(WeightsError, match=message):
            checkpoints.read(path)


def test_suspicious_values_are_named():
    weights = canonical.randomize(BOTTLENECK)
    assert canonical.suspicious(BOTTLENECK, weights) == []
    weights["stem.conv.kernel"].flat[3] = np.nan
    weights["stages.0.blocks.0.norm3.scale"][:] = 0
    weights["stages.1.blocks.0.norm1.var"][1] = -1
    weights["head.fc.kernel"][:] = 0
    found = canonical.suspicious(BOTTLENECK, weights)
    assert [line.partition(":")[0] for line in found] == [
        "stem.conv.kernel",
        "stages.0.blocks.0.norm3.scale",
        "stages.1.blocks.0.norm1.var",
        "head.fc.kernel",
    ]
    assert "1 of" in found[0]
    assert "adds nothing" in found[1]
    assert "not above 0" in found[2]


class TestForAKnownNetwork:
    """`read_for`, what every builder's `weights=` comes to."""

    @pytest.mark.parametrize("format_", [f for f in WRITTEN_HERE if f[0] != "canonical"], ids=":".join)
    @pytest.mark.parametrize("spec", [BOTTLENECK, BASIC, KERAS, BOTTLENECK.replace(head="none", classes=1000)])
    def test_a_foreign_file_takes_the_conventions_of_the_spec(self, tmp_path, format_, spec):
        weights = canonical.randomize(spec)
        found = checkpoints.read_for(spec, written(tmp_path, format_, spec, weights))
        assert found.spec == spec
        same(dict(found.weights), weights)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"classes": 4}, "classes is 5 there and 4 here"),
            ({"blocks": (1, 1)}, "another network: blocks"),
            ({"blocks": (1, 2, 1), "widths": (4, 8, 16)}, "another network: blocks"),
            ({"in_channels": 1}, "in_channels is 3 there and 1 here"),
            ({"conv_bias": True}, "conv_bias is False there and True here"),
        ],
    )
    def test_shapes_of_another_network_are_refused(self, tmp_path, changes, message):
        path = written(tmp_path, ("torchvision", "w.pth"), BOTTLENECK, canonical.randomize(BOTTLENECK))
        with pytest.raises(WeightsError, match=message):
            checkpoints.read_for(BOTTLENECK.replace(**changes), path)

    def test_a_canonical_file_is_held_to_the_spec_it_states(self, tmp_path):
        path = written(tmp_path, ("canonical", "w.safetensors"), BOTTLENECK, canonical.randomize(BOTTLENECK))
        with pytest.raises(WeightsError, match="stride_in is 'conv2' there and 'conv1' here"):
            checkpoints.read_for(BOTTLENECK.replace(stride_in="conv1"), path)

    def test_a_canonical_file_is_held_to_all_but_the_fields_that_are_free(self, tmp_path):
        weights = canonical.randomize(BOTTLENECK)
        path = written(tmp_path, ("canonical", "w.safetensors"), BOTTLENECK, weights)
        for changes in ({"bn_momentum": 0.5}, {"running_variance": "biased"}, {"head": "softmax"}):
            with pytest.raises(WeightsError, match=f"{next(iter(changes))} is .* there and .* here"):
                checkpoints.read_for(BOTTLENECK.replace(**changes), path)
        finer = BOTTLENECK.replace(replace_stride_with_dilation=(True,))
        same(dict(checkpoints.read_for(finer, path).weights), weights)
        headless = BOTTLENECK.with_head(head="none")
        with pytest.raises(WeightsError, match="head is 'logits' there and 'none' here"):
            checkpoints.read_for(headless, path)
        bare = checkpoints.read_for(headless, path, free=("head",))
        assert bare.spec == headless
        assert bare.weights.keys() == canonical.shapes(headless).keys()

    @pytest.mark.parametrize("format_", [("canonical", "w.safetensors"), ("torchvision", "w.pth")], ids=":".join)
    def test_another_family_is_refused_by_both_names(self, tmp_path, format_):
        vgg = architectures.find("vgg11").replace(widths=(2, 2, 2, 2, 2), hidden=(3, 3))
        path = written(tmp_path, format_, vgg, canonical.randomize(vgg))
        with pytest.raises(WeightsError, match="the weights of a vgg, and the network is a resnet"):
            checkpoints.read_for(BOTTLENECK, path)
        with pytest.raises(WeightsError, match="the weights of a vgg, and the network is a resnet"):
            checkpoints.adopt(BOTTLENECK, path, "resnet50")

    def test_a_file_is_parsed_once(self, tmp_path, monkeypatch):
        path = written(tmp_path, ("torchvision", "w.pth"), BOTTLENECK, canonical.randomize(BOTTLENECK))
        parsed, read_zip = [], pytorch.read
        monkeypatch.setattr(pytorch, "read", lambda path: parsed.append(path) or read_zip(path))
        spec, found = checkpoints.adopt(KERAS, path, "resnet50")
        checkpoints.weights_for(spec.replace(head="logits"), found)
        assert parsed == [path]

    def test_a_builder_adopts_the_conventions_of_foreign_weights_alone(self, tmp_path):
        own = KERAS.replace(classes=9)
        weights = canonical.randomize(BOTTLENECK)
        foreign = written(tmp_path, ("torchvision", "w.pth"), BOTTLENECK, weights)
        spec, found = checkpoints.adopt(own, foreign, "resnet50")
        assert found.origin.path == foreign
        assert spec == own.replace(
            stride_in="conv2", conv_bias=False, bn_eps=1e-5, bn_momentum=0.9, running_variance="unbiased"
        )
        stated = written(tmp_path, ("canonical", "w.safetensors"), BOTTLENECK, weights)
        spec, found = checkpoints.adopt(own, stated, "resnet50")
        assert (spec, found.origin.path) == (own, stated)
        assert checkpoints.adopt(own, None, "resnet50") == (own, None)


def test_formats_say_the_same_digest_as_the_command_line_shows(given):
    weights, paths = given
    assert {canonical.digest(checkpoints.read(path).weights) for path in paths.values()} == {canonical.digest(weights)}
    assert architectures.to_dict(checkpoints.read(paths["canonical", "w.safetensors"]).spec) == architectures.to_dict(
        BOTTLENECK
    )


def test_a_canonical_file_carries_what_is_known_beside_the_weights(tmp_path):
    weights = canonical.randomize(KERAS, dtype="float32")
    foreign = written(tmp_path, ("keras_applications", "w.weights.h5"), KERAS, weights)
    found = checkpoints.read(foreign)
    assert found.preprocessing == PRESETS["keras_caffe"]
    names_ = ("a", "b", "ü", "d", "e")
    for name in ("one.safetensors", "two.safetensors"):
        checkpoints.write(tmp_path / name, replace(found, class_names=names_))
        found = checkpoints.read(tmp_path / name)
        assert (found.preprocessing, found.class_names) == (PRESETS["keras_caffe"], names_)
        # Where they came from first, whatever they went through since.
        assert found.origin.before == Origin(
            reference=str(foreign),
            format="keras_applications",
            container="Keras 3 weights",
            assumed=found.origin.before.assumed,
        )
        assert found.origin.before.assumed["stride_in"] == "conv1"
    made_here = written(tmp_path, ("canonical", "here.safetensors"), KERAS, weights)
    assert checkpoints.read(made_here).origin.before is None
    assert checkpoints.read(made_here).preprocessing is None


def test_another_number_of_classes_takes_their_names_away():
    found = Checkpoint(spec=BASIC, weights=canonical.randomize(BASIC), class_names=tuple("abcdefg"))
    assert found.with_classes(7).class_names == found.class_names
    assert found.with_classes(3).class_names == ()
    with pytest.raises(CheckpointError, match="there is no classifier"):
        Checkpoint(spec=BASIC.with_head(head="none"), weights={}).with_classes(3)


def test_a_canonical_file_of_the_format_before_still_reads(tmp_path):
    weights = canonical.randomize(BASIC, dtype="float32")
    path = written(tmp_path, ("canonical", "w.safetensors"), BASIC, weights)
    told = metadata_of(Checkpoint(spec=BASIC, weights=weights))
    old = {"format": "resnet-parity weights 2", "spec": told["spec"], "checksums": told["checksums"]}
    checksum = xxhash.xxh3_128(json.dumps([old[key] for key in ("format", "spec", "checksums")]).encode()).hexdigest()
    save_file(weights, path, old | {"header_checksum": checksum})
    same(dict(checkpoints.read(path).weights), weights)


def test_a_network_of_nobody_here_is_told_what_it_is_most_like(tmp_path):
    """torchvision's MobileNetV2 begins as its EfficientNet does."""
    arrays = {"features.0.0.weight": (32, 3, 3, 3), "features.1.conv.0.0.weight": (32, 1, 3, 3)}
    arrays |= {f"features.{i}.conv.3.weight": (16,) for i in range(2, 9)} | {"features.0.1.weight": (32,)}
    counters = {"features.0.1.num_batches_tracked": np.zeros((), np.int64)}
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in arrays.items()} | counters, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(tmp_path / "a.safetensors")
    message = str(caught.value)
    assert "11 tensors have no names known here: " in message
    assert message.endswith(
        "most like the family efficientnet in torchvision's names, which has no features.1.conv.0.0.weight"
    )
    assert "\n" not in message


def test_two_spellings_of_one_name_are_refused(tmp_path):
    tensors = native(BOTTLENECK, names.find("resnet", "keras_applications"))
    tensors["probs/kernel"] = tensors["predictions/kernel"]
    with pytest.raises(
        CheckpointError,
        match="are two spellings of one name",
    ):
        inference.infer(containers.Source(container="test", tensors=tensors))


class TestVGG:
    """A second family, of whose names and shapes nothing outside its own modules knows."""

    SPEC = architectures.find("vgg11_bn").replace(widths=(2, 3, 4, 5, 6), hidden=(7, 8), classes=9)
    FORMATS = (
        ("canonical", "w.safetensors"),
        ("torchvision", "w.pth"),
        ("timm", "w.pth"),
        ("keras_applications", "w.h5"),
        ("keras_applications", "w.weights.h5"),
        ("flax", "w.msgpack"),
    )

    @pytest.mark.parametrize("head", ["logits", "none"])
    @pytest.mark.parametrize("format_", FORMATS, ids=":".join)
    def test_every_format_comes_back_bitwise(self, tmp_path, format_, head):
        spec = self.SPEC.with_head(head=head)
        weights = canonical.randomize(spec, dtype="float32")
        found = checkpoints.read_for(spec, written(tmp_path, format_, spec, weights))
        same(dict(found.weights), weights)
        assert found.spec == spec

    def test_timm_keeps_dense_layers_as_convolutions_over_the_map(self, tmp_path):
        weights = canonical.randomize(self.SPEC, dtype="float32")
        tensors = names.find("vgg", "timm").tensors(self.SPEC, weights.__getitem__)
        torchvision = names.find("vgg", "torchvision").tensors(self.SPEC, weights.__getitem__)
        assert tensors["pre_logits.fc1.weight"]().shape == (7, 6, 7, 7)
        assert tensors["pre_logits.fc2.weight"]().shape == (8, 7, 1, 1)
        # Rows in the order channel, height, width are what makes the two the same numbers in the same order.
        rows = torchvision["classifier.0.weight"]()
        assert np.array_equal(tensors["pre_logits.fc1.weight"]().reshape(7, -1), rows)

    def test_a_new_head_keeps_the_other_dense_layers(self):
        weights = canonical.randomize(self.SPEC, dtype="float32")
        found = Checkpoint(spec=self.SPEC, weights=weights).with_classes(3)
        changed = {name for name in weights if not np.array_equal(found.weights[name], weights[name])}
        assert changed == {"head.fc.kernel", "head.fc.bias"}
