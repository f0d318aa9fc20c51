"""Inception v3: its counts and names are the published ones, and it is one function in three frameworks."""

import re
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_parity import explain

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures.inception_v3 import CONVENTIONS, VARIANTS, InceptionV3Spec
from common.architectures.layers import multiply_adds, output_shapes
from common.checkpoints import Checkpoint
from common.checkpoints.containers import hdf5
from common.checkpoints.inference import as_read
from common.errors import CheckpointError, InputError, SpecError
from common.images import PRESETS, sample_photos
from common.names.inception_v3 import CANONICAL_FLAX, KERAS_APPLICATIONS, TORCHVISION
from common.parity.case import Case
from common.parity.session import Session
from common.sources.known_weights import table
from common.weights import LazyWeights
from tests.scripts import printed

PHOTOS = tuple(sample_photos())
# variant: parameters, running statistics, norms, convolutions, tensors in torchvision's file
PUBLISHED = {
    "inception_v3": (27_161_264, 36_224, 96, 96, 580),
    "inception_v3.no_aux": (23_834_568, 34_432, 94, 94, 566),
    "inception_v3.timm": (23_834_568, 34_432, 94, 94, 566),
    "inception_v3.keras_applications": (23_817_352, 34_432, 94, 94, 566 - 94),
}
# A module of each kind, two of the last.
SMALL = InceptionV3Spec(unit=2, pool_features=(3,), channels_7x7=(5,), wide_modules=2, classes=6)
NO_AUX = SMALL.replace(aux=False)


def twin(spec: InceptionV3Spec) -> InceptionV3Spec:
    """A few channels wide, a module of each kind: every convention of `spec`, and its code with other numbers."""
    last = 2 if spec.last_pool != spec.branch_pool else 1
    return replace(spec, unit=4, pool_features=(7,), channels_7x7=(10,), wide_modules=last, classes=10)


def counts(spec):
    parameters = sum(layer.parameter_count for layer in spec.layers)
    return parameters, sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())


class TestSpec:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_counts_and_multiply_adds_are_the_published_ones(self, name):
        spec = architectures.find(name)
        kinds = [layer.kind for layer in spec.layers]
        used = architectures.running(spec, training=False)
        operations = sum(multiply_adds(used, output_shapes(used, (299, 299, 3))).values())
        tensors = TORCHVISION.tensors(spec, lambda name: np.zeros(0))
        found = (*counts(spec), kinds.count("norm"), kinds.count("conv"), len(tensors))
        assert (found, operations) == (PUBLISHED[name], 5_713_216_096)
        assert architectures.least_size(spec) == 75

    def test_maps_and_stages_have_the_published_sizes(self):
        spec = architectures.find("inception_v3.no_aux")
        shapes = output_shapes(spec.layers, (299, 299, 3))
        stem = ("stem.1a.conv", "stem.2a.conv", "stem.2b.conv", "stem.pool1", "stem.4a.conv", "stem.pool2")
        assert [shapes[path][0] for path in stem] == [149, 147, 147, 73, 71, 35]
        blocks = [shapes[f"{path}.concat"] for stage in spec.blocks for path in stage]
        assert [width for *_, width in blocks] == [256, 288, 288, *[768] * 5, 1280, 2048, 2048]
        assert [height for height, *_ in blocks] == [35] * 3 + [17] * 5 + [8] * 3
        assert [shapes[path][2] for path in spec.stage_outputs] == [64, 192, 288, 768, 2048]

    def test_auxiliary_logits_are_an_output_of_training_and_with_timm_of_eval_mode(self):
        timm = SMALL.replace(aux_in_eval=True)
        assert architectures.outputs(SMALL, training=True) == ("head.fc", "aux.fc")
        assert architectures.outputs(SMALL, training=False) == ("head.fc",)
        assert architectures.outputs(timm, training=False) == ("head.fc", "aux.fc")
        last = output_shapes(SMALL.with_head(classes=9).layers, (299, 300, 3))
        assert (last["head.fc"], last["aux.fc"]) == ((9,), (9,))
        assert not SMALL.with_head(head="none").aux
        # 17x17 behind the second stage is the least, of images of 299x299.
        output_shapes(architectures.running(SMALL, training=False), (75, 75, 3))
        with pytest.raises(InputError, match=r"input size 298x299 is too small: nothing is left of it at aux.conv1"):
            output_shapes(SMALL.layers, (298, 299, 3))

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"unit": 0}, "unit=0 is not allowed in an inception_v3 spec; expected an integer of at least 1"),
            ({"pool_features": (1,) * 26}, "expected at most 25 entries"),
            ({"wide_modules": 0}, "expected an integer of 1 to 25"),
            ({"transform_input": True, "in_channels": 1}, "expected false but of 3 channels"),
            ({"head": "none"}, "aux=True is not allowed in an inception_v3 spec; expected false with head none"),
            ({"head_pool": "none"}, "expected average or max with head logits"),
            ({"last_pool": "none"}, "expected one of average, max"),
            ({"width": 2}, "unknown field 'width' in an inception_v3 spec"),
        ],
        ids=str,
    )
    def test_a_contradiction_is_one_line_with_field_and_value(self, changes, expected):
        with pytest.raises(SpecError) as caught:
            SMALL.replace(**changes)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_groups_are_the_stem_each_module_the_auxiliary_branch_and_the_head(self):
        groups = SMALL.layer_groups
        starts = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "aux"]
        starts += [f"stages.2.blocks.{b}" for b in range(3)]
        assert [group[0].startswith(f"{start}.") for group, start in zip(groups[1:], [*starts, "head"], strict=True)]
        assert [path for group in groups for path in group] == [layer.path for layer in SMALL.layers]


class TestModels:
    def test_pytorch_gives_a_pair_in_training_can_be_scripted_and_gives_its_stages(self):
        import torch

        import resnet_torch

        model = resnet_torch.from_spec(NO_AUX.replace(dropout=0.0)).eval()
        images = torch.randn(2, 3, 76, 91)
        with torch.no_grad():
            scripted = torch.jit.script(model)
            assert torch.equal(scripted(images), model(images))
            stages = scripted.stages(images)
        expected = output_shapes(NO_AUX.layers, (76, 91, 3))
        assert [(*x.shape[2:], x.shape[1]) for x in stages] == [expected[path] for path in NO_AUX.stage_outputs]
        pair = torch.jit.script(resnet_torch.from_spec(SMALL))
        images = torch.randn(2, 3, 299, 299)
        with torch.no_grad():
            assert {name: tuple(x.shape) for name, x in pair(images)._asdict().items()} == {
                "logits": (2, 6),
                "aux_logits": (2, 6),
            }
            assert pair.eval()(images).shape == (2, 6)

    def test_pytorch_has_torchvisions_keywords_and_initialisation(self):
        import torch

        import resnet_torch

        options = {"aux_logits": False, "transform_input": True, "dropout": 0.25, "num_classes": 7}
        with torch.device("meta"):
            model = resnet_torch.inception_v3(weights=None, progress=False, init_weights=False, **options)
        changes = {"aux": False, "transform_input": True, "dropout": 0.25, "classes": 7}
        assert model.spec == VARIANTS["inception_v3"].replace(**changes)
        torch.manual_seed(0)
        state = resnet_torch.from_spec(SMALL.replace(unit=8, classes=400)).state_dict()
        assert float(state["AuxLogits.conv1.conv.weight"].std()) == pytest.approx(0.1, rel=0.02)
        assert float(state["fc.weight"].std()) == pytest.approx(0.1, rel=0.02)
        assert float(state["fc.weight"].abs().max()) > 0.35  # nothing is cut off
        assert float(state["AuxLogits.fc.weight"].std()) == pytest.approx(0.001, rel=0.02)
        assert 0 < float(state["fc.bias"].abs().max()) <= 1024**-0.5

    @pytest.mark.slow
    def test_flax_variables_are_called_as_the_layers_and_initialised_as_torchvisions(self):
        import jax
        from flax.traverse_util import flatten_dict

        import resnet_flax

        assert resnet_flax.InceptionV3(num_classes=5, aux=False).spec == VARIANTS["inception_v3.no_aux"].replace(
            classes=5
        )
        model = resnet_flax.from_spec(SMALL)
        images = np.zeros((2, 299, 299, 3), np.float32)
        found = flatten_dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images))
        assert {"/".join(path): leaf.shape for path, leaf in found.items()} == {
            native: layer.arrays[name] for name, (native, layer) in CANONICAL_FLAX.arrays(SMALL).items()
        }
        shapes = jax.eval_shape(
            lambda v, x: model.apply(v, x, rngs={"dropout": jax.random.key(0)}, mutable=True),
            jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images),
            images,
        )
        assert [leaf.shape for leaf in shapes[0]] == [(2, 6), (2, 6)]
        assert [leaf.shape[-1] for leaf in shapes[1]["intermediates"]["stages"]] == [8, 24, 31, 96, 256]


KERAS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures, checkpoints
found = {}
bare = resnet_keras.InceptionV3(include_top=False, pooling="max")
found["bare"] = bare.output.shape, bare.count_params(), architectures.to_dict(bare.spec)
names = lambda model: [layer.name for layer in model.layers if "pool" not in layer.name and "input" not in layer.name]
theirs = [keras.applications.InceptionV3(weights=None, include_top=False, pooling="max") for _ in range(2)]
found["names"] = names(bare) == names(theirs[0])
theirs[1].save_weights("PATH.weights.h5")
read = checkpoints.read("PATH.weights.h5")
found["first"] = theirs[1].layers[1].name
model = resnet_keras.from_spec(bare.spec, weights=read)
found["same"] = all((a == b).all() for a, b in zip(model.get_weights(), theirs[1].get_weights(), strict=True))
small = architectures.from_dict(SPEC)
one = resnet_keras.from_spec(small, input_shape=(299, 300, 3))
found["outputs"] = [output.shape for output in one.outputs]
found["stages"] = [list(stage.shape) for stage in resnet_keras.stage_outputs(one).outputs]
own = keras.layers.Conv2D(3, 2, name="conv2d")(keras.Input((200, 200, 4)))
behind = resnet_keras.from_spec(bare.spec, input_tensor=keras.layers.Conv2D(3, 2, name="conv2d_4")(own))
found["behind"] = [layer.name for layer in behind.layers if layer.name.startswith("conv2d")][1:4]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_keras_models_are_those_of_keras_applications_and_a_second_ones_file_is_ranked(session, tmp_path):
    code = KERAS.replace("SPEC", repr(architectures.to_dict(SMALL))).replace("PATH", str(tmp_path / "second"))
    found = printed(session, "keras:tensorflow", code)
    *bare, spec = found["bare"]
    assert architectures.from_dict(spec) == VARIANTS["inception_v3.keras_applications"].with_head(
        head="none", pool="max"
    )
    assert bare == [[None, 2048], 23_817_352 + 34_432 - 1000 * 2049]
    assert found["names"]
    assert found["first"] == "conv2d_94"
    assert found["same"]
    assert found["outputs"] == [[None, 6]] * 2
    assert [shape[-1] for shape in found["stages"]] == [8, 24, 31, 96, 256]
    assert found["behind"] == ["conv2d_4", "conv2d_5", "conv2d_6"]


def checkpoint(spec: InceptionV3Spec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0, dtype="float32"))


def assert_same(found: Checkpoint, made: Checkpoint) -> None:
    assert found.spec == made.spec
    for name in made.weights:
        assert np.array_equal(found.weights[name], made.weights[name]), name


def keras_file(path, made: Checkpoint, first: int) -> None:
    """As a process has it that numbered `first - 1` such layers before; from 1 on, as the published file of Keras 2."""

    def renamed(name: str) -> str:
        layer, array = name.split("/")
        kind, number = re.fullmatch(r"(conv2d|batch_normalization|.*?)_?(\d*)", layer).groups()
        if kind not in ("conv2d", "batch_normalization"):
            return name
        return f"{kind}_{int(number or 0) + first}/{array}"

    tensors = KERAS_APPLICATIONS.tensors(made.spec, made.weights.__getitem__)
    hdf5.write(path, LazyWeights({renamed(name): tensors[name] for name in tensors}), {})


class TestNames:
    @pytest.mark.parametrize(
        ("name", "to", "convention"),
        [
            ("a.pth", "torchvision", "torchvision"),
            ("a.safetensors", "timm", "no_aux"),
            ("a.safetensors", "canonical", "slim"),
            ("a.msgpack", "flax", "torchvision"),
            ("a.h5", "keras_applications", "keras_applications"),
            ("a.weights.h5", "keras_applications", "keras_applications"),
        ],
    )
    def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(self, tmp_path, name, to, convention):
        made = checkpoint(SMALL.replace(**CONVENTIONS.get(convention, {})))
        checkpoints.write(tmp_path / name, made, to)
        assert_same(checkpoints.read(tmp_path / name), made)

    @pytest.mark.parametrize("first", [1, 94, 10_000])
    @pytest.mark.parametrize("name", ["a.h5", "a.weights.h5"])
    def test_keras_numbers_are_ranked_wherever_a_process_began_to_count(self, tmp_path, name, first):
        made = checkpoint(VARIANTS["inception_v3.keras_applications"].replace(unit=1, classes=3))
        keras_file(tmp_path / name, made, first)
        assert_same(checkpoints.read(tmp_path / name), made)

    @pytest.mark.parametrize(
        "spec",
        [
            NO_AUX.replace(pool_features=(1, 2, 3, 4), channels_7x7=(2, 2, 5), wide_modules=3),
            SMALL.replace(norm=False, in_channels=1),
            NO_AUX.replace(bn_scale=False, wide_modules=1),
            SMALL.with_head(head="none", pool="average"),
            VARIANTS["inception_v3.fid"],
            VARIANTS["inception_v3"],
        ],
        ids=lambda spec: f"{spec.unit}-{spec.pool_features}-{spec.aux}-{spec.head}",
    )
    def test_shapes_show_widths_modules_scales_and_auxiliary_logits(self, spec):
        assert as_read(spec, TORCHVISION).layers == spec.layers
        keras = spec.replace(
            **{name: CONVENTIONS["keras_applications"][name] for name in ("count_padding", "head")}
            if spec.head != "none"
            else {"count_padding": False}
        )
        found = as_read(keras, KERAS_APPLICATIONS)
        assert (found.blocks, found.unit, found.channels_7x7) == (spec.blocks, spec.unit, spec.channels_7x7)

    def test_names_are_those_of_the_communities(self):
        spec = VARIANTS["inception_v3"]
        torchvision, keras = TORCHVISION.layers(spec), KERAS_APPLICATIONS.layers(spec)
        # Of each module, the number of its first convolution and the name of its end.
        firsts = (5, 12, 19, 26, 30, 40, 50, 60, 70, 76, 85)
        letters = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
        blocks = [path for stage in spec.blocks for path in stage]
        for number, (path, first, letter) in enumerate(zip(blocks, firsts, letters, strict=True)):
            conv = next(layer.path for layer in spec.layers if layer.path.startswith(path))
            assert (keras[conv], keras[f"{path}.concat"]) == (f"conv2d_{first}", f"mixed{number}")
            assert torchvision[conv].startswith(f"Mixed_{letter}.branch")
        assert [keras[f"{blocks[-1]}.branch3x3{part}"] for part in ("", "dbl")] == ["mixed9_1", "concatenate_1"]
        assert keras["aux.conv1.norm"] == "aux_conv1_bn"
        assert torchvision["aux.conv1.norm"] == "AuxLogits.conv1.bn"

    @pytest.mark.parametrize(
        ("gone", "expected"),
        [
            ("Mixed_7c.branch3x3_2b.conv.weight", "missing Mixed_7c.branch3x3_2b.conv.weight"),
            ("Mixed_5b.branch_pool.conv.weight", "no kernel of stages.0.blocks.0.branch_pool.conv is there"),
            ("Mixed_7b.", "the modules Mixed_7 have a gap: number 1 is missing, and 2 is there"),
        ],
    )
    def test_a_file_that_is_not_whole_is_refused_in_one_line(self, tmp_path, gone, expected):
        checkpoints.write(tmp_path / "a.safetensors", checkpoint(NO_AUX), "torchvision")
        tensors = load_file(tmp_path / "a.safetensors")
        save_file({name: x for name, x in tensors.items() if not name.startswith(gone)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError) as caught:
            checkpoints.read(tmp_path / "a.safetensors")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_builder_takes_the_conventions_of_weights_and_no_logits_that_they_have_not(self, tmp_path):
        import resnet_torch

        made = checkpoint(VARIANTS["inception_v3.keras_applications"].replace(unit=1, classes=3))
        keras_file(tmp_path / "a.h5", made, 1)
        read = checkpoints.read(tmp_path / "a.h5")
        spec, _ = checkpoints.adopt(VARIANTS["inception_v3"], read, "inception_v3")
        assert (spec.aux, spec.bn_scale, spec.count_padding, spec.transform_input) == (False, False, False, False)
        model = resnet_torch.from_spec(read.spec, weights=read)
        assert model.Conv2d_1a_3x3.bn.weight is None
        with_aux = checkpoint(SMALL)
        checkpoints.write(tmp_path / "a.pth", with_aux, "torchvision")
        without = resnet_torch.from_spec(NO_AUX, weights=tmp_path / "a.pth")
        assert without.AuxLogits is None

    def test_published_weights_have_their_conventions(self):
        known = {entry.reference: entry for entry in table() if entry.variant == "inception_v3"}
        torchvision = known["torchvision:inception_v3:IMAGENET1K_V1"]
        assert torchvision.spec == VARIANTS["inception_v3"].replace(transform_input=True)
        assert PRESETS[torchvision.preprocessing].crop == 299
        assert known["keras:inception_v3:imagenet:notop"].spec.head == "none"
        assert known["pytorch_fid:inception_v3:2015-12-05"].spec.classes == 1008


# Every convention of the table in three networks: auxiliary logits want images of 299x299, and are in one of them.
KINDS: dict[str, tuple[InceptionV3Spec, tuple[int, int]]] = {
    "torchvision": (twin(VARIANTS["inception_v3.transform_input"]).replace(aux=False), (108, 123)),
    "keras_applications": (twin(VARIANTS["inception_v3.keras_applications"]), (107, 92)),
    "fid_with_aux": (twin(VARIANTS["inception_v3.fid"]).replace(aux=True), (299, 300)),
}
IN_ALL = [pytest.param(name, marks=[] if name == "keras_applications" else pytest.mark.long) for name in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ALL)
def test_every_kind_of_inception_v3_is_one_function_in_three_frameworks(session: Session, name: str) -> None:
    spec, size = KINDS[name]
    result = session.check(Case(variant=name, spec=spec, size=size, photos=PHOTOS, dtypes=("float64",)))
    assert result.passed, explain(result)
