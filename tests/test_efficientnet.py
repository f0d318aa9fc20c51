"""EfficientNet: its counts and names are the published ones, and it is one function in three frameworks."""

from math import prod

import h5py
import numpy as np
import pytest
from test_parity import explain, field_values

from common import architectures, checkpoints, names
from common import weights as canonical
from common.architectures.efficientnet import CONVENTIONS, SCALINGS, VARIANTS, EfficientNetSpec
from common.architectures.layers import multiply_adds, output_shapes
from common.checkpoints import Checkpoint
from common.errors import CheckpointError, SpecError
from common.images import PRESETS, sample_photos
from common.parity.case import Case
from common.parity.session import Session
from common.sources.known_weights import table
from tests.scripts import printed

# variant: parameters, running statistics, tensors in torchvision's file, multiply-adds at the usual size, convolutions
PUBLISHED = {
    "efficientnet_b0": (5_288_548, 42_016, 360, 385_814_752, 81),
    "efficientnet_b1": (7_794_184, 62_048, 508, 686_802_832, 115),
    "efficientnet_b2": (9_109_994, 67_568, 508, 993_561_872, 115),
    "efficientnet_b3": (12_233_232, 87_296, 574, 1_827_141_392, 130),
    "efficientnet_b4": (19_341_616, 125_200, 706, 4_393_771_024, 160),
    "efficientnet_b5": (30_389_784, 172_736, 854, 10_266_384_752, 194),
    "efficientnet_b6": (43_040_704, 224_432, 986, 19_067_593_536, 224),
    "efficientnet_b7": (66_347_960, 310_720, 1200, 37_745_884_192, 273),
    # timm's, built by it.
    "efficientnet_lite0": (4_652_008, 42_016, 296, 385_187_552, 49),
    "efficientnet_lite1": (5_416_680, 53_664, 386, 600_185_232, 64),
    "efficientnet_lite2": (6_092_072, 58_096, 386, 859_736_272, 64),
    "efficientnet_lite3": (8_197_096, 76_672, 440, 1_607_554_544, 73),
    "efficientnet_lite4": (13_006_568, 112_368, 548, 3_943_564_112, 91),
}
# Narrow, with everything that a large one has: blocks with and without expansion, with and without a residual.
SMALL = EfficientNetSpec(
    widths=(16, 24, 32, 40),
    repeats=(2, 1, 2, 1),
    expand=(1, 3, 3, 2),
    kernels=(3, 3, 5, 3),
    strides=(1, 2, 2, 1),
    stem_width=16,
    head_width=64,
    classes=10,
)
# What shapes cannot show follows from the published depth; any widths that differ will do.
NARROW = VARIANTS["efficientnet_b0"].replace(widths=(8, 10, 12, 16, 18, 24, 28), stem_width=8, head_width=20, classes=7)
KINDS = {
    "efficientnet_b0": SMALL,
    "efficientnet_b5": SMALL.replace(bn_eps=1e-3, bn_momentum=0.99),
    "efficientnet_b0.keras_applications": SMALL.replace(**CONVENTIONS["keras_applications"]),
    "efficientnet_b0.timm_tf": SMALL.replace(**CONVENTIONS["timm_tf"]),
    "efficientnet_lite0.timm_tf": SMALL.replace(**CONVENTIONS["timm_tf"], se_ratio=0.0, activation="relu6"),
}


def checkpoint(spec: EfficientNetSpec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0, dtype="float32"))


class TestSpec:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_counts_are_the_published_ones_under_every_convention(self, name):
        spec = architectures.find(name)
        size = {"efficientnet_lite3": 300, "efficientnet_lite4": 380}.get(name, SCALINGS[name].size)
        assert spec.default_size == (size, size)
        kinds = [layer.kind for layer in spec.layers]
        shapes = output_shapes(spec.layers, (size, size, 3))
        norms = kinds.count("norm")
        found = (
            sum(layer.parameter_count for layer in spec.layers),
            sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values()),
            sum(len(layer.arrays) for layer in spec.layers) + norms,  # and a counter for each
            sum(multiply_adds(spec.layers, shapes).values()),
            kinds.count("conv") + kinds.count("depthwise"),
        )
        assert found == PUBLISHED[name]
        others = [other for other in VARIANTS if other.startswith(f"{name}.")]
        assert len(others) == (2 if "lite" in name else 4)
        for other in others:
            assert canonical.shapes(VARIANTS[other]) == canonical.shapes(spec)

    def test_nine_tenths_of_a_width_are_kept_and_nothing_but_b3_shows_it(self):
        assert VARIANTS["efficientnet_b3"].widths[0] == 24
        assert [VARIANTS[f"efficientnet_b{i}"].bn_eps for i in range(8)] == [1e-5] * 5 + [1e-3] * 3
        assert [VARIANTS[f"efficientnet_b{i}"].dropout for i in range(8)] == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]

    def test_the_gate_is_a_quarter_of_what_the_block_reads_and_blocks_are_dropped_by_their_depth(self):
        layers = {layer.path: layer for layer in VARIANTS["efficientnet_b0"].layers}
        assert [layers[f"stages.{s}.blocks.0.squeeze"].out_channels for s in range(7)] == [8, 4, 6, 10, 20, 28, 48]
        assert layers["stages.1.blocks.1.squeeze"].out_channels == 6
        rates = {path: layer.rate for path, layer in layers.items() if layer.kind == "stochastic_depth"}
        assert len(rates) == 9
        assert rates["stages.1.blocks.1.drop"] == pytest.approx(0.2 * 2 / 16)
        assert rates["stages.5.blocks.3.drop"] == pytest.approx(0.2 * 14 / 16)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"repeats": (1, 2)}, "repeats=(1, 2) is not allowed in an efficientnet spec; expected 4 entries"),
            ({"kernels": (3, 4, 3, 3)}, "expected odd numbers"),
            ({"se_ratio": 1.5}, "expected a share of at least 0 and at most 1"),
            ({"input_mean": (0.5,)}, "expected 3 entries, one a channel, or none"),
            ({"input_mean": (0.5,) * 3}, "input_std=() is not allowed in an efficientnet spec; expected as many"),
            ({"head_pool": "none"}, "expected average or max with head logits"),
            ({"activation": "gelu"}, "activation='gelu' is not allowed"),
            ({"widths": (8, 8)}, "repeats=(2, 1, 2, 1) is not allowed"),
        ],
        ids=str,
    )
    def test_a_contradiction_is_one_line_with_field_and_value(self, changes, expected):
        with pytest.raises(SpecError) as caught:
            SMALL.replace(**changes)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_groups_and_stages(self):
        spec = SMALL.replace(head="softmax")
        assert [path for group in spec.layer_groups for path in group] == [layer.path for layer in spec.layers]
        assert [group[0] for group in spec.layer_groups][-2:] == ["head.conv", "head.pool"]
        shapes = output_shapes(spec.layers, (64, 33, 3))
        assert [shapes[path] for path in spec.stage_outputs] == [(32, 17, 16), (16, 9, 24), (8, 5, 40)]
        assert spec.replace(in_channels=1).layers[0].in_channels == 1
        assert SMALL.replace(input_mean=(0.0,) * 3, input_std=(1.0,) * 3).replace(in_channels=4).input_std == (1.0,) * 4


class TestPyTorch:
    def test_modules_initialisation_keywords_stages_and_scripting(self):
        import torch

        import resnet_torch

        with torch.device("meta"):
            state = resnet_torch.efficientnet_b0().state_dict()
            model = resnet_torch.efficientnet_b1(
                weights=None, progress=False, num_classes=7, dropout=0.1, stochastic_depth_prob=0.0, norm_layer=None
            )
        expected = VARIANTS["efficientnet_b1"].replace(classes=7, dropout=0.1, stochastic_depth=0.0)
        assert model.spec == expected
        assert len(state) == PUBLISHED["efficientnet_b0"][2]
        assert state["features.1.0.block.0.0.weight"].shape == (32, 1, 3, 3)  # nothing to expand: the depthwise one
        assert state["features.6.2.block.2.fc1.weight"].shape == (48, 1152, 1, 1)
        assert state["classifier.1.weight"].shape == (1000, 1280)

        torch.manual_seed(0)
        model = resnet_torch.from_spec(SMALL.replace(stem_width=64, head_width=256)).eval()
        state = model.state_dict()
        assert float(state["features.5.0.weight"].var()) == pytest.approx(2 / 256, rel=0.1)
        assert float(state["features.1.0.block.0.0.weight"].var()) == pytest.approx(2 / (64 * 9), rel=0.2)
        assert float(state["classifier.1.weight"].abs().max()) == pytest.approx(10**-0.5, rel=0.01)
        images = torch.randn(2, 3, 33, 20)
        with torch.no_grad():
            assert [tuple(map.shape) for map in model.stages(images)] == [
                *((2, 16, 17, 10), (2, 24, 9, 5), (2, 40, 5, 3)),
            ]
            assert torch.equal(torch.jit.script(model)(images), model(images))
            inside = resnet_torch.from_spec(SMALL.replace(**CONVENTIONS["keras_applications"])).eval()
            assert torch.equal(torch.jit.script(inside)(images), inside(images))


@pytest.mark.usefixtures("unoptimised")
def test_flax_variables_are_called_as_the_layers_and_initialised_as_torchvisions():
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    import resnet_flax

    model = resnet_flax.EfficientNetB0(num_classes=5, dropout=0.1)
    assert model.spec == VARIANTS["efficientnet_b0"].replace(classes=5, dropout=0.1)
    spec = SMALL.replace(repeats=(1, 1, 1, 1), stem_width=32, head_width=256)
    model, images = resnet_flax.from_spec(spec), jnp.zeros((1, 33, 20, 3))
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)
    found = {"/".join(path): leaf for path, leaf in flatten_dict(variables).items()}
    naming = names.find("efficientnet", "flax")
    assert {name: array.shape for name, array in found.items()} == {
        native: layer.arrays[name] for name, (native, layer) in naming.arrays(spec).items()
    }
    assert np.var(found["params/head.conv/kernel"]) == pytest.approx(2 / 256, rel=0.1)
    assert np.var(found["params/stages.0.blocks.0.depthwise/kernel"]) == pytest.approx(2 / (32 * 9), rel=0.3)
    assert np.abs(found["params/head.fc/kernel"]).max() == pytest.approx(10**-0.5, rel=0.01)
    _, state = jax.eval_shape(lambda v, x: model.apply(v, x, train=False, mutable=["intermediates"]), variables, images)
    assert [x.shape for x in state["intermediates"]["stages"]] == [(1, 17, 10, 16), (1, 9, 5, 24), (1, 5, 3, 40)]


KERAS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures, checkpoints, weights
from common.architectures.efficientnet import CONVENTIONS, VARIANTS
from common.checkpoints import Checkpoint
from test_efficientnet import NARROW, SMALL
found = {}
model = resnet_keras.EfficientNetB0(weights=None, classes=3)
theirs = keras.applications.EfficientNetB0(weights=None, classes=3)
found["names"] = [[layer.name for layer in one.layers if layer.weights] for one in (model, theirs)]
found["count"] = [one.count_params() for one in (model, theirs)]
found["default"] = model.name, model.output_shape
conv = model.get_layer("block2a_dwconv").kernel
found["variance"] = [float(np.var(one.get_layer(name).kernel))
    for one in (model, theirs) for name in ("block6b_dwconv", "top_conv")]
theirs.save_weights("FOLDER/theirs.weights.h5")
read = checkpoints.read("FOLDER/theirs.weights.h5")
found["bare"] = read.spec == model.spec == architectures.find("efficientnet_b0.keras_applications").replace(
    classes=3, input_mean=(0.0,) * 3, input_std=(1.0,) * 3)
small = NARROW.replace(**CONVENTIONS["keras_applications"])
made = Checkpoint(spec=small, weights=weights.randomize(small, 0, dtype="float32"))
images = np.random.default_rng(0).uniform(0, 255, (2, 33, 20, 3)).astype("float32")
ours = resnet_keras.from_spec(small, weights=made)
ours.save("FOLDER/ours.keras")
ours.save_weights("FOLDER/ours.weights.h5")
for name in ("ours.keras", "ours.weights.h5"):
    again = checkpoints.read(f"FOLDER/{name}")
    found[name] = again.spec == small and all(np.array_equal(again.weights[a], made.weights[a]) for a in made.weights)
reloaded = keras.models.load_model("FOLDER/ours.keras")
found["same"] = bool((reloaded.predict(images, verbose=0) == ours.predict(images, verbose=0)).all())
checkpoints.write("FOLDER/written.h5", made, "keras_applications")
checkpoints.write("FOLDER/written.weights.h5", made, "keras_applications")
for name in ("written.h5", "written.weights.h5"):
    fresh = resnet_keras.from_spec(small)
    fresh.load_weights(f"FOLDER/{name}")
    found[name] = bool((fresh.predict(images, verbose=0) == ours.predict(images, verbose=0)).all())
bare = resnet_keras.from_spec(small.replace(input_mean=(0.0,) * 3, input_std=(1.0,) * 3))
try:
    bare.load_weights("FOLDER/written.h5")
except ValueError as error:
    found["refused"] = str(error)
gray = resnet_keras.EfficientNetB0(weights=None, include_top=False, input_shape=(None, None, 1), pooling="max")
found["gray"] = gray.output_shape
print(json.dumps(found))
"""


@pytest.mark.slow
def test_keras_models_are_those_of_keras_applications_and_its_files_are_theirs(session, tmp_path):
    code = KERAS.replace("FOLDER", str(tmp_path))
    found = printed(session, "keras:tensorflow", code)
    assert found["names"][0] == found["names"][1]
    assert found["count"][0] == found["count"][1] == 5_288_548 + 42_016 + 7 - 997 * 1281
    assert found["default"] == ["efficientnetb0", [None, 3]]
    assert found["variance"][:2] == pytest.approx(found["variance"][2:], rel=0.05)
    assert found["bare"]
    assert found["same"]
    assert [found[name] for name in ("ours.keras", "ours.weights.h5", "written.h5", "written.weights.h5")] == [True] * 4
    assert "normalization has the mean [0.0, 0.0, 0.0] and these weights have [0.48" in found["refused"]
    assert found["gray"] == [None, 1280]


SHORT = ("efficientnet_b0", "efficientnet_b0.keras_applications", "efficientnet_lite0.timm_tf")


def test_the_short_list_has_every_value_of_every_field():
    assert field_values(KINDS[name] for name in SHORT) == field_values(KINDS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in KINDS]
)
def test_every_kind_of_efficientnet_is_one_function_in_three_frameworks(session: Session, name: str) -> None:
    case = Case(variant=name, spec=KINDS[name], size=(64, 65), photos=tuple(sample_photos()), dtypes=("float64",))
    result = session.check(case)
    assert result.passed, explain(result)


class TestNames:
    @pytest.mark.parametrize("lite", [False, True])
    @pytest.mark.parametrize(
        ("file", "to", "convention"),
        [
            ("a.pth", "torchvision", {}),
            ("a.safetensors", "timm", CONVENTIONS["timm"]),
            ("a.safetensors", "canonical", CONVENTIONS["timm_tf"]),
            ("a.bin", "huggingface", CONVENTIONS["huggingface"]),
            ("a.h5", "keras_applications", CONVENTIONS["keras_applications"]),
            ("a.weights.h5", "keras_applications", CONVENTIONS["keras_applications"]),
            ("a.msgpack", "flax", {}),
        ],
    )
    def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(self, tmp_path, file, to, convention, lite):
        made = checkpoint(NARROW.replace(**convention, **({"se_ratio": 0.0} if lite else {})))
        # What has no gates is taken for a Lite.
        made = checkpoint(made.spec.replace(activation="relu6")) if lite else made
        written = checkpoints.write(tmp_path / file, made, to)
        found = checkpoints.read(tmp_path / file, changes=None)
        expected = made.spec
        if lite and "activation" in written.fields:
            expected = expected.replace(activation=found.spec.activation)
        assert (found.spec, found.origin.format) == (expected, to)
        for array in made.weights:
            assert np.array_equal(found.weights[array], made.weights[array]), array

    @pytest.mark.parametrize("name", [name for name in VARIANTS if "." not in name])
    def test_names_and_shapes_show_every_variant_and_it_brings_its_own_norms(self, name):
        for to, convention in (("torchvision", ""), ("timm", ".timm"), ("keras_applications", ".keras_applications")):
            spec = VARIANTS.get(f"{name}{convention}")
            if spec is not None:
                naming = names.find("efficientnet", to)
                shapes = {native: layer.arrays[array] for array, (native, layer) in naming.arrays(spec).items()}
                places = naming.places({native.rpartition(".")[0] or native for native in shapes}, lambda *_: None)
                layers = naming.layers(spec)
                if to != "keras_applications":
                    assert {place.path: name for name, place in places.items()} == {
                        layer.path: layers[layer.path] for layer in spec.layers if layer.arrays
                    }
                assert checkpoints.inference.as_read(spec, naming) == spec

    def test_timms_conv_pw_is_the_projection_where_nothing_is_expanded(self):
        layers = names.find("efficientnet", "timm").layers(NARROW)
        assert layers["stages.0.blocks.0.project"] == "blocks.0.0.conv_pw"
        assert layers["stages.0.blocks.0.project_norm"] == "blocks.0.0.bn2"
        assert layers["stages.1.blocks.0.expand"] == "blocks.1.0.conv_pw"
        assert layers["stages.1.blocks.0.project"] == "blocks.1.0.conv_pwl"

    def published(self, tmp_path, **changes):
        """As tf.keras wrote it: depthwise kernels by another name, layers numbered in their process."""
        spec = NARROW.replace(**CONVENTIONS["keras_applications"])
        made, naming = checkpoint(spec), names.find("efficientnet", "keras_applications")
        arrays = {name: read() for name, read in naming.tensors(spec, made.weights.__getitem__).items()} | changes
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for name, array in arrays.items():
                layer, _, role = name.partition("/")
                role = "depthwise_kernel" if layer.endswith("dwconv") else role
                layer = "normalization_1" if layer == "normalization" else layer
                if array is not None:
                    file[f"{layer}/{layer}/{role}:0"] = array
        return made

    def test_a_published_file_of_keras_has_deviations_where_it_says_variance(self, tmp_path):
        made = self.published(tmp_path)
        found = checkpoints.read(tmp_path / "a.h5")
        assert found.spec == made.spec
        assert found.spec.input_std == (0.229, 0.224, 0.225)
        assert found.preprocessing == PRESETS["keras_raw"]
        assert all(np.array_equal(found.weights[array], made.weights[array]) for array in made.weights)
        (tmp_path / "out").mkdir()
        checkpoints.write(tmp_path / "out" / "a.h5", found, "keras_applications")
        with h5py.File(tmp_path / "a.h5") as before, h5py.File(tmp_path / "out" / "a.h5") as after:
            for role in ("mean", "variance", "count"):
                old, new = (
                    before[f"normalization_1/normalization_1/{role}:0"],
                    after[f"normalization/normalization/{role}:0"],
                )
                assert (old.dtype, old.shape) == (new.dtype, new.shape)
                assert np.array_equal(old[()], new[()])

    def test_an_adapted_normalisation_is_read_by_its_variance_and_none_is_outside(self, tmp_path):
        mean, variance = np.float32([0.5, 0.4, 0.3]), np.float32([0.04, 0.09, 0.0625])
        self.published(tmp_path, **{"normalization/mean": mean, "normalization/variance": variance})
        found = checkpoints.read(tmp_path / "a.h5").spec
        assert found.input_mean == (0.5, 0.4, 0.3)
        assert found.input_std == pytest.approx((0.2, 0.3, 0.25), rel=1e-7)
        self.published(tmp_path, **{f"normalization/{role}": None for role in ("mean", "variance", "count")})
        assert checkpoints.read(tmp_path / "a.h5").spec.input_mean == ()

    @pytest.mark.parametrize(
        ("changes", "fields", "expected"),
        [
            ({"normalization/variance": None}, {}, "normalization/variance is missing"),
            ({"normalization/variance": np.float32([1, 0, 1])}, {}, "none of an image"),
            (
                {},
                {"input_mean": (0.0,) * 3},
                "the file's own layer normalization says input_mean=(0.485, 0.456, 0.406)",
            ),
            ({"top_conv/kernel": None}, {}, "head.conv is missing; is the file whole?"),
            ({"block4b_dwconv/kernel": None}, {}, "stages.3.blocks.1.depthwise is missing"),
            (
                {"block4b_dwconv/kernel": np.ones((5, 5, 3, 1), np.float32)},
                {},
                "block4b_dwconv/depthwise_kernel has shape",
            ),
        ],
        ids=str,
    )
    def test_a_damaged_file_is_one_line(self, tmp_path, changes, fields, expected):
        self.published(tmp_path, **changes)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.read(tmp_path / "a.h5", changes=fields)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_published_weights_name_every_variant_that_has_some(self):
        known = [entry for entry in table() if entry.spec.family == "efficientnet"]
        assert {entry.variant for entry in known} == set(PUBLISHED)
        (b3,) = [entry for entry in known if entry.reference == "torchvision:efficientnet_b3:IMAGENET1K_V1"]
        assert b3.changes == {"resize": 320, "crop": 300}
        assert [entry.spec.head for entry in known if entry.reference == "keras:efficientnet_b0:imagenet:notop"] == [
            "none"
        ]
        assert all(entry.preprocessing == "timm_half" for entry in known if "ap_in1k" in entry.reference)

    @pytest.mark.parametrize(("variant", "odd"), [("b0", []), ("b1", [16]), ("b7", [18])])
    def test_transformers_config_says_scaling_and_which_blocks_see_an_odd_map(self, tmp_path, variant, odd):
        naming = names.find("efficientnet", "huggingface")
        spec = VARIANTS[f"efficientnet_{variant}.huggingface"].replace(classes=2)
        config = naming.beside.write(spec, ("cat", "dog"))
        scaling = SCALINGS[f"efficientnet_{variant}"]
        assert (config["width_coefficient"], config["depth_coefficient"]) == (scaling.width, scaling.depth)
        assert (config["image_size"], config["hidden_dim"]) == (scaling.size, spec.head_width)
        assert config["depthwise_padding"] == odd
        assert naming.beside.read(config).class_names == ("cat", "dog")
        with pytest.raises(CheckpointError, match=r"no config for a network with padding='symmetric'"):
            naming.beside.write(spec.replace(padding="symmetric"), ())
