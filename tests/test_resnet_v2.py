"""ResNet with pre-activation: counts and names are the published ones, and it is one function in three frameworks."""

from math import prod

import h5py
import numpy as np
import pytest
from test_parity import explain

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures.layers import output_shapes
from common.architectures.resnet_v2 import CONVENTIONS, VARIANTS, ResNetV2Spec
from common.checkpoints import Checkpoint
from common.errors import CheckpointError, SpecError, WeightsError
from common.images import PRESETS, sample_photos
from common.names.resnet_v2 import KERAS_APPLICATIONS, TIMM
from common.parity.case import Case
from common.parity.session import Session
from common.sources.known_weights import table
from tests.scripts import printed

PHOTOS = tuple(sample_photos())
# Parameters and running statistics, which keras.applications counts together, and parameters of timm's.
KERAS = {"resnet50v2": 25_613_800, "resnet101v2": 44_675_560, "resnet152v2": 60_380_648}
STATISTICS = {"resnet50v2": 45_440, "resnet101v2": 97_664, "resnet152v2": 143_744}
TIMMS = {"resnet50v2": 25_549_352, "resnet101v2": 44_541_480, "resnet152v2": 60_185_128}
SMALL = ResNetV2Spec(blocks=(2, 1), widths=(4, 6), stem_width=6, classes=7)
KINDS = {
    "keras_applications": SMALL.replace(**CONVENTIONS["keras_applications"]),
    "paper": SMALL.replace(**CONVENTIONS["paper"]),
}


def counts(spec):
    parameters = sum(layer.parameter_count for layer in spec.layers)
    return parameters, sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())


def of(spec, path):
    return next(layer for layer in spec.layers if layer.path == path)


class TestSpec:
    @pytest.mark.parametrize("name", KERAS)
    def test_parameters_and_statistics_are_those_that_keras_and_timm_count(self, name):
        assert counts(VARIANTS[name]) == (KERAS[name] - STATISTICS[name], STATISTICS[name])
        assert counts(VARIANTS[f"{name}.keras_applications"]) == counts(VARIANTS[name])
        assert counts(VARIANTS[f"{name}.timm"]) == counts(VARIANTS[f"{name}.paper"]) == (TIMMS[name], STATISTICS[name])

    def test_the_papers_network_for_cifar_has_its_1_7_million_parameters(self):
        # Of 164 layers, table 4 of the paper; the first convolution of a block strides in the authors' code.
        assert counts(VARIANTS["resnet164v2"])[0] == 1_703_258
        assert VARIANTS["resnet164v2"].default_size == (32, 32)

    @pytest.mark.parametrize(
        ("convention", "sides", "strided"),
        [("keras_applications", [28, 14, 7, 7], "conv2"), ("timm", [56, 28, 14, 7], "conv2")],
    )
    def test_a_stage_halves_the_map_at_its_end_or_at_its_start(self, convention, sides, strided):
        spec = VARIANTS[f"resnet50v2.{convention}"]
        shapes = output_shapes(spec.layers, (224, 224, 3))
        blocks = spec.blocks
        assert [shapes[f"stages.{s}.blocks.{n - 1}.add"][0] for s, n in enumerate(blocks)] == sides
        # The levels of a pyramid are at all resolutions in both.
        assert [shapes[path] for path in spec.stage_outputs] == [
            *((56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048))
        ]
        first = 1 if convention == "timm" else 0
        block = "stages.1.blocks.0" if first else "stages.0.blocks.2"
        assert (of(spec, f"{block}.{strided}").stride, of(spec, f"{block}.conv1").stride) == (2, 1)

    def test_a_projection_reads_the_activation_and_an_identity_or_its_pixels_the_sum(self):
        spec = VARIANTS["resnet50v2"]
        assert of(spec, "stages.1.blocks.0.shortcut.conv").inputs == ("stages.1.blocks.0.relu1",)
        assert of(spec, "stages.1.blocks.1.add").inputs[1] == "stages.1.blocks.0.add"
        assert of(spec, "stages.1.blocks.3.shortcut.pool").inputs == ("stages.1.blocks.2.add",)
        assert of(spec, "head.norm").inputs == ("stages.3.blocks.2.add",)

    def test_biases_stand_where_no_norm_follows(self):
        biased = {
            layer.path.rpartition("blocks.")[2][2:] or layer.path
            for layer in SMALL.layers
            if layer.kind == "conv" and layer.bias
        }
        assert {path.rpartition(".")[2] for path in biased} == {"conv", "conv3"}
        assert not any(layer.bias for layer in KINDS["paper"].layers if layer.kind == "conv")
        assert all(layer.bias for layer in SMALL.exact_twin.layers if layer.kind == "conv")

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"blocks": (1, 2)}, "blocks=(1, 2) is not allowed in a resnet_v2 spec; expected 2 or more in each stage"),
            ({"blocks": (9_999, 2)}, "expected at most 10000 in all"),
            ({"widths": (8,)}, "widths=(8,) is not allowed in a resnet_v2 spec; expected 2 entries, as many as blocks"),
            ({"stem_kernel": 6}, "stem_kernel=6 is not allowed in a resnet_v2 spec; expected an odd number"),
            ({"head_pool": "none"}, "head_pool='none' is not allowed in a resnet_v2 spec; expected average or max"),
            ({"pool_padding": "ones"}, "expected one of zeros, symmetric, same"),
            ({"groups": 2}, "unknown field 'groups' in a resnet_v2 spec"),
        ],
        ids=str,
    )
    def test_a_contradiction_is_one_line_with_field_and_value(self, changes, expected):
        with pytest.raises(SpecError) as caught:
            SMALL.replace(**changes)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_groups_are_the_stem_each_block_and_the_head(self):
        assert [group[0] for group in SMALL.layer_groups] == [
            *("stem.conv", "stages.0.blocks.0.norm1", "stages.0.blocks.1.norm1", "stages.1.blocks.0.norm1"),
            "head.norm",
        ]
        assert [path for group in SMALL.layer_groups for path in group] == [layer.path for layer in SMALL.layers]


class TestPyTorch:
    def test_names_are_after_torchvisions_way_and_a_projection_has_a_bias(self):
        import torch

        import resnet_torch

        with torch.device("meta"):
            model = resnet_torch.resnet50v2(weights=None, progress=False, num_classes=10)
        state = model.state_dict()
        assert model.spec == VARIANTS["resnet50v2"].replace(classes=10)
        assert state["fc.weight"].shape == (10, 2048)
        assert {"conv1.bias", "layers.0.0.bn1.running_mean", "layers.3.2.conv3.bias", "bn.weight"} <= set(state)
        assert state["layers.0.0.downsample.bias"].shape == (256,)
        assert not {"layers.0.0.conv1.bias", "layers.0.1.downsample.weight", "bn1.weight"} & set(state)
        kinds = [type(model.layers[0][b].downsample).__name__ for b in range(3)]
        assert kinds == ["Conv2d", "NoneType", "MaxPool2d"]

    def test_initialisation_is_torchvisions_and_the_last_kernels_are_zero_where_asked(self):
        import torch

        import resnet_torch

        torch.manual_seed(0)
        spec = SMALL.replace(widths=(32, 32))
        state = resnet_torch.from_spec(spec).state_dict()
        assert float(state["layers.0.0.conv2.weight"].var()) == pytest.approx(2 / (32 * 9), rel=0.05)
        assert float(state["fc.weight"].abs().max()) == pytest.approx(128**-0.5, rel=0.05)
        assert not state["layers.0.0.conv3.bias"].any()
        zeroed = resnet_torch.from_spec(spec, zero_init_residual=True).state_dict()
        assert not zeroed["layers.1.0.conv3.weight"].any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_stages_are_a_pyramid_and_the_model_can_be_scripted(self, kind):
        import torch

        import resnet_torch

        model = resnet_torch.from_spec(KINDS[kind]).eval()
        images = torch.randn(2, 3, 33, 20)
        with torch.no_grad():
            outputs = model.stages(images)
            scripted = torch.jit.script(model)
            assert torch.equal(scripted(images), model(images))
            assert all(map(torch.equal, scripted.stages(images), outputs))
        assert [tuple(output.shape) for output in outputs] == [(2, 16, 9, 5), (2, 24, 5, 3)]

    def test_without_norms_the_shortcut_is_not_overwritten(self):
        import torch

        import resnet_torch

        model = resnet_torch.from_spec(SMALL.exact_twin).eval()
        block, x = model.layers[0][1], torch.randn(1, 16, 5, 5)
        before = x.clone()
        block(x)
        assert torch.equal(x, before)


class TestFlax:
    def test_variables_are_called_as_the_layers_of_the_spec(self):
        import jax
        import jax.numpy as jnp
        from flax.traverse_util import flatten_dict

        import resnet_flax

        model = resnet_flax.ResNet50V2(num_classes=5)
        assert model.spec == VARIANTS["resnet50v2"].replace(classes=5)
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        found = flatten_dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images))
        native = {"/".join(path): leaf.shape for path, leaf in found.items()}
        expected = {}
        for layer in model.spec.layers:
            for name, shape in layer.arrays.items():
                where = "batch_stats" if name in layer.statistics else "params"
                expected[f"{where}/{layer.path}/{name.removeprefix(layer.path + '.')}"] = shape
        assert native == expected

    @pytest.mark.slow
    @pytest.mark.usefixtures("unoptimised")
    def test_initialisation_is_torchvisions(self):
        import jax
        import jax.numpy as jnp

        import resnet_flax

        model, images = resnet_flax.from_spec(SMALL.replace(blocks=(1,), widths=(32,))), jnp.zeros((1, 9, 9, 3))
        params = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)["params"]
        assert np.var(params["stages.0.blocks.0.conv2"]["kernel"]) == pytest.approx(2 / (32 * 9), rel=0.05)
        for array in params["head.fc"].values():
            assert 0 < np.abs(array).max() <= 128**-0.5
        assert not np.any(params["stem.conv"]["bias"])

    def test_stages_are_sown(self):
        import jax
        import jax.numpy as jnp

        import resnet_flax

        def sown(key, images):
            model = resnet_flax.from_spec(SMALL)
            variables = model.init(key, images, train=False)
            return model.apply(variables, images, train=False, mutable=["intermediates"])[1]["intermediates"]["stages"]

        found = jax.eval_shape(sown, jax.random.key(0), jnp.zeros((1, 33, 20, 3)))
        assert [x.shape for x in found] == [(1, 9, 5, 16), (1, 5, 3, 24)]


KERAS_MODELS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures
found = {}
ours = resnet_keras.ResNet50V2(weights=None, classes=3, input_shape=(64, 65, 3))
found["spec"] = architectures.to_dict(ours.spec)
theirs = keras.applications.ResNet50V2(weights=None, classes=3, input_shape=(64, 65, 3))
weighted = lambda model: [[l.name, [list(w.shape) for w in l.weights]] for l in model.layers if l.weights]
found["layers"] = weighted(ours) == weighted(theirs)
names = {layer.name for layer in ours.layers}
found["missing"] = [l.name for l in theirs.layers if l.name not in names]
found["added"] = sorted(names - {l.name for l in theirs.layers})
found["counts"] = ours.count_params(), theirs.count_params()
small = resnet_keras.from_spec(architectures.from_dict(json.loads(SPEC)))
small.save("PATH")
images = np.random.default_rng(0).normal(size=(2, 33, 20, 3))
again = keras.models.load_model("PATH")
found["same"] = bool((again.predict(images, verbose=0) == small.predict(images, verbose=0)).all())
found["stages"] = [list(x.shape) for x in resnet_keras.stage_outputs(small)(images)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_keras_models_have_the_layers_of_keras_applications(session, tmp_path):
    code = KERAS_MODELS.replace("SPEC", repr(architectures.to_json(SMALL))).replace("PATH", str(tmp_path / "a.keras"))
    found = printed(session, "keras:tensorflow", code)
    assert architectures.from_dict(found["spec"]) == VARIANTS["resnet50v2.keras_applications"].replace(classes=3)
    assert found["layers"], "other layers with weights, in another order, or of other shapes"
    # Paddings that our convolutions need not or name after themselves, and layers that have a number there.
    assert all(name.endswith("_pad") or name.startswith(("max_pooling2d", "input")) for name in found["missing"])
    assert "pool1_pad" not in found["missing"]
    assert all(name.endswith(("_conv_pad", "_0_pool", "_softmax")) or "input" in name for name in found["added"])
    assert found["counts"] == [KERAS["resnet50v2"] - 2049 * 997] * 2
    assert found["same"]
    assert found["stages"] == [[2, 9, 5, 16], [2, 5, 3, 24]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_function_in_three_frameworks(session: Session, kind: str) -> None:
    result = session.check(Case(variant=kind, spec=KINDS[kind], size=(34, 41), photos=PHOTOS, dtypes=("float64",)))
    assert result.passed, explain(result)


def checkpoint(spec: ResNetV2Spec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0), preprocessing=PRESETS["keras_tf"])


def same(found, made):
    return all(np.array_equal(found[array], made[array]) for array in made)


class TestNames:
    # A depth and widths that no variant has.
    KERAS = ResNetV2Spec(blocks=(2, 3, 1), widths=(4, 6, 5), stem_width=6, classes=7)
    TIMM = KERAS.replace(**CONVENTIONS["timm"])
    CIFAR = VARIANTS["resnet164v2"].replace(blocks=(1, 2, 1))

    @pytest.mark.parametrize("spec", [KERAS, TIMM, CIFAR], ids=["keras", "timm", "cifar"])
    @pytest.mark.parametrize(
        ("name", "to"),
        [
            ("a.pth", "torchvision"),
            ("a.safetensors", "torchvision"),
            ("a.pth", "timm"),
            ("a.safetensors", "timm"),
            ("a.safetensors", "canonical"),
            ("a.msgpack", "flax"),
            ("a.h5", "keras_applications"),
            ("a.weights.h5", "keras_applications"),
        ],
    )
    def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(self, tmp_path, name, to, spec):
        spec = spec.with_head(head="softmax") if to.startswith("keras") else spec
        made = checkpoint(spec)
        written = checkpoints.write(tmp_path / name, made, to)
        found = checkpoints.read(tmp_path / name)
        assert (found.spec, found.origin.format, dict(written.fields)) == (spec, to, {})
        assert same(found.weights, made.weights)

    def test_a_bias_tells_whose_network_it_is(self, tmp_path):
        """What no shape shows differs between them: where a stage strides, how the pool pads, eps."""
        for spec in (self.KERAS, self.TIMM):
            checkpoints.write(tmp_path / "a.pth", checkpoint(spec))
            found = checkpoints.read(tmp_path / "a.pth").spec
            assert (found.stride_at, found.pool_padding, found.bn_eps) == (
                ("end", "zeros", 1.001e-5) if spec is self.KERAS else ("start", "symmetric", 1e-5)
            )
        assert checkpoints.read(tmp_path / "a.pth", convention="paper").spec.stride_in == "conv1"

    def test_timms_classifier_is_a_convolution(self):
        tensors = TIMM.tensors(self.TIMM, checkpoint(self.TIMM).weights.__getitem__)
        assert tensors["head.fc.weight"]().shape == (7, 20, 1, 1)
        assert {"stem.conv.weight", "stages.1.blocks.0.downsample.conv.weight", "norm.running_var"} <= set(tensors)

    def test_an_older_spelling_of_keras_is_read(self, tmp_path):
        spec = self.KERAS.with_head(head="softmax")
        made, layers = checkpoint(spec), KERAS_APPLICATIONS.layers(spec)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for name, tensor in KERAS_APPLICATIONS.tensors(spec, made.weights.__getitem__).items():
                layer, array = name.split("/")
                layer = "probs" if layer == "predictions" else layer
                file.require_group(layer)[f"{layer}/{array}:0"] = tensor()
        assert layers["head.fc"] == "predictions"
        found = checkpoints.read(tmp_path / "a.h5")
        assert found.spec == spec
        assert same(found.weights, made.weights)

    @pytest.mark.parametrize("name", ["a.pth", "a.h5", "a.msgpack"])
    def test_a_file_without_a_classifier_is_a_network_without_one(self, tmp_path, name):
        bare = self.KERAS.with_head(head="none", pool="average")
        checkpoints.write(tmp_path / name, checkpoint(bare))
        assert checkpoints.read(tmp_path / name).spec.layers == bare.layers

    @pytest.mark.parametrize(
        ("left_out", "message"),
        [
            ("layers.1.1.", "a stage or a block is missing; is the file whole"),
            ("layers.0.0.conv3.weight", "no kernel of stages.0.blocks.0.conv3 is there"),
            ("layers.0.1.bn2.weight", "layers.0.1.bn2.weight"),
        ],
    )
    def test_a_file_that_is_not_whole_is_refused_in_one_line(self, tmp_path, left_out, message):
        import torch

        checkpoints.write(tmp_path / "a.pth", checkpoint(self.KERAS))
        state = torch.load(tmp_path / "a.pth", weights_only=True)
        torch.save({k: v for k, v in state.items() if not k.startswith(left_out)}, tmp_path / "b.pth")
        with pytest.raises(CheckpointError) as caught:
            checkpoints.read(tmp_path / "b.pth")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_weights_of_a_resnet_are_refused_in_one_line_that_names_both(self, tmp_path):
        resnet = architectures.find("resnet20")
        made = Checkpoint(spec=resnet, weights=canonical.randomize(resnet, 0))
        checkpoints.write(tmp_path / "a.pth", made)
        with pytest.raises(WeightsError, match="these are the weights of a resnet, and the network is a resnet_v2"):
            checkpoints.read_for(SMALL, tmp_path / "a.pth")

    def test_published_weights_name_every_variant_that_has_some(self):
        known = [entry for entry in table() if entry.spec.family == "resnet_v2"]
        assert {entry.variant for entry in known} == set(KERAS)
        assert {entry.preprocessing for entry in known if entry.reference.startswith("keras:")} == {"keras_tf"}
        assert {entry.spec.stride_at for entry in known if entry.reference.startswith("hf:")} == {"start"}
        assert [entry.spec.head for entry in known if entry.reference == "keras:resnet50v2:imagenet:notop"] == ["none"]
