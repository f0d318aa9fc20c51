"""DenseNet: its counts and names are the published ones, and it is one function in three frameworks."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_parity import explain

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures.densenet import VARIANTS, DenseNetSpec
from common.architectures.layers import multiply_adds, output_shapes
from common.checkpoints import Checkpoint
from common.checkpoints.containers import hdf5
from common.errors import CheckpointError, SpecError
from common.images import PRESETS, sample_photos
from common.names.densenet import KERAS_APPLICATIONS, KERAS_HUB, TORCHVISION
from common.parity.case import Case
from common.parity.session import Session
from common.sources.known_weights import table
from common.weights import LazyWeights
from tests.scripts import printed

PHOTOS = tuple(sample_photos())
# variant: parameters, running statistics, norms, convolutions, tensors in torchvision's file, multiply-adds at 224
PUBLISHED = {
    "densenet121": (7_978_856, 83_648, 121, 120, 727, 2_834_161_664),
    "densenet169": (14_149_480, 158_400, 169, 168, 1015, 3_359_843_328),
    "densenet201": (20_013_928, 229_056, 201, 200, 1207, 4_291_365_888),
    "densenet161": (28_681_000, 219_936, 161, 160, 967, 7_727_907_072),
    "densenet264": (33_337_704, 398_528, 265, 264, 1591, 5_751_653_376),
}
WIDTHS = {  # behind each block
    "densenet121": (256, 512, 1024, 1024),
    "densenet169": (256, 512, 1280, 1664),
    "densenet201": (256, 512, 1792, 1920),
    "densenet161": (384, 768, 2112, 2208),
    "densenet264": (256, 512, 2304, 2688),
}
SMALL = DenseNetSpec(blocks=(2, 1), growth_rate=5, bottleneck=3, stem_width=7, compression=0.6, classes=6)


def counts(spec):
    parameters = sum(layer.parameter_count for layer in spec.layers)
    return parameters, sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())


def twin(spec: DenseNetSpec) -> DenseNetSpec:
    """A few channels wide and two blocks deep: every convention of `spec`, and its code with other numbers."""
    return replace(spec, blocks=(2, 1), growth_rate=6, bottleneck=3, stem_width=10, compression=0.6, classes=10)


KINDS: dict[DenseNetSpec, str] = {}
for _name, _spec in VARIANTS.items():
    # Dropout changes training alone, and is on in one of them.
    KINDS.setdefault(replace(twin(_spec), dropout=0.25 if "." not in _name else 0.0), _name)


class TestSpec:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_counts_and_multiply_adds_are_the_published_ones(self, name):
        spec = architectures.find(name)
        kinds = [layer.kind for layer in spec.layers]
        operations = sum(multiply_adds(spec.layers, output_shapes(spec.layers, (224, 224, 3))).values())
        tensors = TORCHVISION.tensors(spec, lambda name: np.zeros(0))
        found = (*counts(spec), kinds.count("norm"), kinds.count("conv"), len(tensors), operations)
        assert found == PUBLISHED[name]
        assert tuple(width for width, _ in spec.widths) == WIDTHS[name]

    def test_conventions_change_no_parameter_but_that_of_tutorials(self):
        for name in ("densenet121", "densenet169", "densenet201"):
            for convention in ("keras_applications", "keras_hub"):
                assert counts(architectures.find(f"{name}.{convention}")) == PUBLISHED[name][:2]
        tutorial = architectures.find("densenet121.tutorial")
        assert counts(tutorial) == (7_989_032, 83_648)
        # A ring of the bias around each transition's map.
        shapes = output_shapes(tutorial.layers, (224, 224, 3))
        sides = [shapes[f"transitions.{b}.{part}"][0] for b in range(3) for part in ("conv", "pool")]
        assert sides == [58, 29, 31, 15, 17, 8]

    def test_a_transition_keeps_its_share_rounded_down_whatever_its_binary_form(self):
        spec = DenseNetSpec(blocks=(1, 1), compression=0.29)
        assert 100 * 0.29 < 29
        assert [spec.transition_width(channels) for channels in (100, 101, 103, 104)] == [29, 29, 29, 30]
        assert spec.replace(compression=1 / 3).transition_width(96) == 32

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"blocks": ()}, "blocks=() is not allowed in a densenet spec"),
            ({"blocks": (1_000, 1_001)}, "expected at most 2000 in all"),
            ({"compression": 0.0}, "compression=0.0 is not allowed in a densenet spec; expected a number above 0"),
            (
                {"compression": 0.01},
                "compression=0.01 is not allowed in a densenet spec; expected a share of 17 channels",
            ),
            ({"dropout": 1.0}, "dropout=1.0 is not allowed in a densenet spec; expected a share of at least 0"),
            ({"transition_padding": -1}, "expected an integer of at least 0"),
            ({"stem_padding": "valid"}, "expected one of symmetric, same"),
            ({"head_pool": "none"}, "head_pool='none' is not allowed in a densenet spec; expected average or max"),
            ({"growth": 3}, "unknown field 'growth' in a densenet spec; did you mean 'growth_rate'?"),
        ],
        ids=str,
    )
    def test_a_contradiction_is_one_line_with_field_and_value(self, changes, expected):
        with pytest.raises(SpecError) as caught:
            SMALL.replace(**changes)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_groups_are_the_stem_each_dense_layer_and_transition_and_the_head(self):
        spec = SMALL.replace(head="softmax")
        groups = spec.layer_groups
        assert [group[0].rpartition(".")[0] for group in groups] == [
            *("stem", "blocks.0.layers.0", "blocks.0.layers.1", "transitions.0", "blocks.1.layers.0", "head")
        ]
        assert [path for group in groups for path in group] == [layer.path for layer in spec.layers]
        shapes = output_shapes(spec.layers, (64, 65, 3))
        assert [shapes[path] for path in spec.stage_outputs] == [(16, 17, 17), (8, 8, 15)]

    def test_without_a_head_it_gives_the_last_map_behind_its_relu_or_a_vector(self):
        bare = SMALL.with_head(head="none")
        assert bare.layers[-1].path == "head.relu"
        pooled = SMALL.with_head(head="none", pool="max")
        assert output_shapes(pooled.layers, (64, 64, 3))[pooled.layers[-1].path] == (15,)
        assert pooled.with_head(head="softmax", classes=3).head_pool == "average"


class TestPyTorch:
    @pytest.mark.parametrize("name", ["densenet121", "densenet161"])
    def test_the_state_is_torchvisions(self, name):
        import torch

        import resnet_torch

        with torch.device("meta"):
            model = getattr(resnet_torch, name)()
        state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        growth, stem = (32, 64) if name == "densenet121" else (48, 96)
        assert len(state) == PUBLISHED[name][4]
        assert state["features.conv0.weight"] == (stem, 3, 7, 7)
        assert state["features.denseblock1.denselayer2.conv1.weight"] == (4 * growth, stem + growth, 1, 1)
        assert state["features.denseblock1.denselayer2.conv2.weight"] == (growth, 4 * growth, 3, 3)
        assert state["features.transition3.conv.weight"] == (WIDTHS[name][2] // 2, WIDTHS[name][2], 1, 1)
        assert state["features.norm5.running_var"] == (WIDTHS[name][3],)
        assert state["classifier.bias"] == (1000,)
        assert [name for name, _ in model.features.named_children()] == [
            *("conv0", "norm0", "relu0", "pool0", "denseblock1", "transition1", "denseblock2", "transition2"),
            *("denseblock3", "transition3", "denseblock4", "norm5"),
        ]

    def test_the_builder_takes_torchvisions_keywords(self):
        import torch

        import resnet_torch

        with torch.device("meta"):
            options = {"bn_size": 2, "drop_rate": 0.2, "num_classes": 7, "memory_efficient": True}
            model = resnet_torch.densenet121(weights=None, progress=False, **options)
        expected = architectures.find("densenet121").replace(bottleneck=2, dropout=0.2, classes=7)
        assert model.spec == expected
        assert model.features.denseblock4.denselayer16.memory_efficient

    def test_initialisation_is_torchvisions(self):
        import torch

        import resnet_torch

        torch.manual_seed(0)
        model = resnet_torch.from_spec(SMALL.replace(growth_rate=40, stem_width=64, classes=400, conv_bias=True))
        state = model.state_dict()
        # Kaiming-normal over fan_in: 2 / (120 * 9). The dense layer: uniform within 1 / sqrt(fan_in).
        kernel = state["features.denseblock1.denselayer1.conv2.weight"]
        assert float(kernel.var()) == pytest.approx(2 / (120 * 9), rel=0.05)
        bound = state["classifier.weight"].shape[1] ** -0.5
        assert float(state["classifier.weight"].abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(state["classifier.weight"].std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not any(tensor.any() for name, tensor in state.items() if name.endswith(".bias"))

    @pytest.mark.parametrize("running_variance", ["unbiased", "biased"])
    def test_with_less_memory_it_trains_the_same_and_averages_each_batch_once(self, running_variance):
        import torch

        import resnet_torch

        spec = SMALL.replace(running_variance=running_variance)
        plain, frugal = (resnet_torch.from_spec(spec, memory_efficient=flag) for flag in (False, True))
        frugal.load_state_dict(plain.state_dict())
        images = torch.randn(3, 3, 40, 33)
        for model in (plain, frugal):
            model(images).square().sum().backward()
        for (name, one), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), name
        for (name, one), other in zip(plain.state_dict().items(), frugal.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
        with torch.no_grad():
            assert torch.equal(plain.eval()(images), frugal.eval()(images))

    def test_can_be_scripted_and_gives_its_stages(self):
        import torch

        import resnet_torch

        model = resnet_torch.from_spec(SMALL.replace(dropout=0.1)).eval()
        images = torch.randn(2, 3, 64, 65)
        with torch.no_grad():
            scripted = torch.jit.script(model)
            assert torch.equal(scripted(images), model(images))
            stages = scripted.stages(images)
        assert [tuple(stage.shape) for stage in stages] == [(2, 17, 16, 17), (2, 15, 8, 8)]
        features = model.relu(model.features.norm5(stages[-1])).mean((2, 3))
        assert torch.allclose(model.classifier(features), model(images))


class TestFlax:
    @pytest.mark.usefixtures("unoptimised")
    def test_variables_are_called_as_the_layers_and_initialised_as_torchvisions(self):
        import jax
        import jax.numpy as jnp
        from flax.traverse_util import flatten_dict

        import resnet_flax

        spec = SMALL.replace(blocks=(1,), growth_rate=40, stem_width=64, classes=400)
        model = resnet_flax.from_spec(spec)
        variables = jax.jit(model.init, static_argnames="train")(
            jax.random.key(0), jnp.zeros((1, 32, 33, 3)), train=False
        )
        found = {"/".join(path): leaf for path, leaf in flatten_dict(variables).items()}
        expected = {
            f"{'batch_stats' if name in layer.statistics else 'params'}/{layer.path}.{name.rpartition('.')[2]}": shape
            for layer in spec.layers
            for name, shape in layer.arrays.items()
        }
        dotted = {path.split("/", 1)[0] + "/" + path.split("/", 1)[1].replace("/", "."): x for path, x in found.items()}
        assert {path: leaf.shape for path, leaf in dotted.items()} == expected
        assert np.var(found["params/blocks.0.layers.0/conv2/kernel"]) == pytest.approx(2 / (120 * 9), rel=0.05)
        kernel = np.asarray(found["params/head.fc/kernel"])
        assert np.abs(kernel).max() == pytest.approx(kernel.shape[0] ** -0.5, rel=0.01)

    def test_the_builder_takes_fields_of_the_spec(self):
        import resnet_flax

        model = resnet_flax.DenseNet169(num_classes=5, dropout=0.1)
        assert model.spec == architectures.find("densenet169").replace(classes=5, dropout=0.1)


KERAS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures
from keras.src.applications.densenet import DenseNet
found = {}
bare = resnet_keras.DenseNet121(include_top=False, pooling="max")
found["bare"] = bare.output.shape, bare.count_params(), architectures.to_dict(bare.spec)
# keras.applications' own code at another depth: its models take seconds to build.
theirs = DenseNet([2, 1, 1, 1], weights=None, classes=3, input_shape=(32, 64, 3))
model = resnet_keras.from_spec(bare.spec.replace(blocks=(2, 1, 1, 1), head="softmax", classes=3, head_pool="average"))
names = lambda one: [layer.name for layer in one.layers if not layer.name.startswith(("input", "zero_padding"))]
pads = {"conv1_conv_pad", "pool1_pad", "predictions_softmax"}
found["names"] = [name for name in names(model) if name not in pads] == names(theirs)
model.set_weights(theirs.get_weights())
images = np.random.default_rng(0).normal(size=(1, 32, 64, 3))
found["apart"] = float(np.abs(model(images) - theirs(images)).max())
small = architectures.from_dict(SPEC)
one = resnet_keras.from_spec(small, input_shape=(64, 65, 3))
found["stages"] = [list(stage.shape) for stage in resnet_keras.stage_outputs(one).outputs]
one.save("PATH")
again = keras.models.load_model("PATH")
images = np.random.default_rng(0).normal(size=(2, 64, 65, 3))
found["same"] = bool((again.predict(images, verbose=0) == one.predict(images, verbose=0)).all())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_keras_models_are_those_of_keras_applications(session, tmp_path):
    spec = architectures.to_dict(SMALL.replace(transition_padding=1, conv_bias=True))
    code = KERAS.replace("SPEC", repr(spec)).replace("PATH", str(tmp_path / "small.keras"))
    found = printed(session, "keras:tensorflow", code)
    *bare, spec = found["bare"]
    expected = architectures.find("densenet121.keras_applications").with_head(head="none", pool="max")
    assert architectures.from_dict(spec) == expected
    assert bare == [[None, 1024], sum(PUBLISHED["densenet121"][:2]) - 1000 * 1025]
    assert found["names"]
    assert found["apart"] < 1e-6
    assert found["stages"] == [[None, 16, 17, 17], [None, 9, 9, 15]]
    assert found["same"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", KINDS, ids=KINDS.get)
def test_every_kind_of_densenet_is_one_function_in_three_frameworks(session: Session, spec: DenseNetSpec) -> None:
    result = session.check(Case(variant=KINDS[spec], spec=spec, size=(64, 65), photos=PHOTOS, dtypes=("float64",)))
    assert result.passed, explain(result)


def checkpoint(spec: DenseNetSpec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0, dtype="float32"))


def assert_same(found: Checkpoint, made: Checkpoint) -> None:
    assert found.spec == made.spec
    for name in made.weights:
        assert np.array_equal(found.weights[name], made.weights[name]), name


class TestNames:
    @pytest.mark.parametrize(
        ("name", "to", "convention"),
        [
            ("a.pth", "torchvision", ""),
            ("a.safetensors", "torchvision", ""),
            ("a.safetensors", "canonical", "tutorial"),
            ("a.msgpack", "flax", ""),
            ("a.h5", "keras_applications", "keras_applications"),
            ("a.weights.h5", "keras_applications", "keras_applications"),
            ("a.h5", "keras_hub", "keras_hub"),
            ("a.weights.h5", "keras_hub", "keras_hub"),
        ],
    )
    def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(self, tmp_path, name, to, convention):
        made = checkpoint(SMALL.replace(**architectures.conventions("densenet").get(convention, {})))
        checkpoints.write(tmp_path / name, made, to)
        found = checkpoints.read(tmp_path / name)
        assert found.origin.format == to
        assert_same(found, made)
        assert checkpoints.read(tmp_path / name, changes={} if to == "canonical" else {"dropout": 0.1}).weights

    @pytest.mark.parametrize(
        "spec",
        [
            DenseNetSpec(blocks=(3,), growth_rate=4, stem_width=6, norm=False, conv_bias=True),
            DenseNetSpec(blocks=(1, 2, 1), growth_rate=3, stem_width=10, compression=0.7, in_channels=1),
            DenseNetSpec(blocks=(1, 1), growth_rate=3, stem_width=6, compression=1 / 3, classes=2),
            DenseNetSpec(blocks=(1, 1), growth_rate=2, stem_width=6, compression=1.0, bottleneck=1),
            SMALL.with_head(head="none", pool="average"),
            VARIANTS["densenet264"],
        ],
        ids=lambda spec: f"{spec.blocks}-{spec.compression:.2f}-{spec.head}",
    )
    def test_shapes_show_depth_widths_biases_norms_and_head(self, spec):
        from common.checkpoints.inference import as_read

        assert as_read(spec, TORCHVISION).layers == spec.layers

    def test_torchvisions_names_of_old_are_read(self, tmp_path):
        """As in the published files: a dot before the number, and no counter of batches."""
        made = checkpoint(SMALL)
        checkpoints.write(tmp_path / "new.safetensors", made, "torchvision")
        old = {}
        for name, array in load_file(tmp_path / "new.safetensors").items():
            if "denselayer" in name:
                *where, layer, role = name.split(".")
                name = ".".join([*where, f"{layer[:-1]}.{layer[-1]}", role])
            if not name.endswith("num_batches_tracked"):
                old[name] = array
        assert "features.denseblock1.denselayer1.norm.1.running_mean" in old
        save_file(old, tmp_path / "old.safetensors")
        found = checkpoints.read(tmp_path / "old.safetensors")
        assert_same(found, made)
        assert found.preprocessing == PRESETS["torchvision"]
        twice = old | {"features.denseblock1.denselayer1.norm1.weight": old["features.norm0.weight"]}
        save_file(twice, tmp_path / "twice.safetensors")
        with pytest.raises(CheckpointError, match="two spellings of one name"):
            checkpoints.read(tmp_path / "twice.safetensors")

    def test_keras_names_of_old_are_read(self, tmp_path):
        """As in the published files: the stem's in folders of folders, conv1/conv and conv1/bn, beside the last bn."""
        made = checkpoint(SMALL.replace(**architectures.conventions("densenet")["keras_applications"]))
        tensors = KERAS_APPLICATIONS.tensors(made.spec, made.weights.__getitem__)
        old = {
            name.replace("conv1_conv/", "conv1/conv/").replace("conv1_bn/", "conv1/bn/"): tensors[name]
            for name in tensors
        }
        assert {"conv1/conv/kernel", "conv1/bn/gamma", "bn/gamma"} <= old.keys()
        hdf5.write(tmp_path / "old.h5", LazyWeights(old), {})
        found = checkpoints.read(tmp_path / "old.h5")
        assert_same(found, made)
        assert found.preprocessing == PRESETS["keras_torch"]

    def test_names_are_those_of_the_communities(self):
        spec = architectures.find("densenet121")
        last = [path.removesuffix(".kernel") for path in ("blocks.3.layers.15.conv2.kernel", "transitions.2.norm")]
        for naming, expected in (
            (TORCHVISION, ["features.denseblock4.denselayer16.conv2", "features.transition3.norm"]),
            (KERAS_APPLICATIONS, ["conv5_block16_2_conv", "pool4_bn"]),
            (KERAS_HUB, ["stack4_block16_2_conv", "transition3_bn"]),
        ):
            assert [naming.layers(spec)[path] for path in last] == expected

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (
                lambda name: "denselayer1." not in name,
                "layers of block 0 have a gap: number 0 is missing, and 1 is there",
            ),
            (
                lambda name: "transition1.conv" not in name,
                "no kernel of transitions.0.conv is there; is the file whole?",
            ),
            (lambda name: "norm5.weight" not in name, "missing features.norm5.weight"),
        ],
    )
    def test_a_file_that_is_not_whole_is_refused_in_one_line(self, tmp_path, change, expected):
        checkpoints.write(tmp_path / "a.safetensors", checkpoint(SMALL), "torchvision")
        tensors = load_file(tmp_path / "a.safetensors")
        save_file({name: array for name, array in tensors.items() if change(name)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError) as caught:
            checkpoints.read(tmp_path / "a.safetensors")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_published_weights_name_every_variant_that_has_some(self):
        known = [entry for entry in table() if entry.spec.family == "densenet"]
        assert {entry.variant for entry in known} == PUBLISHED.keys() - {"densenet264"}
        assert {entry.preprocessing for entry in known if entry.reference.startswith("keras:")} == {"keras_torch"}
        heads = {entry.reference: entry.spec.head for entry in known if entry.variant == "densenet201"}
        assert heads["keras:densenet201:imagenet:notop"] == "none"
        assert heads["torchvision:densenet201:IMAGENET1K_V1"] == "logits"
