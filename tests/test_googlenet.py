"""GoogLeNet: its counts and names are the published ones, and each version is one function in three frameworks."""

from functools import partial
from math import prod

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_parity import explain

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures import outputs, running
from common.architectures.googlenet import CONVENTIONS, VARIANTS, GoogLeNetSpec
from common.architectures.layers import multiply_adds, output_shapes
from common.checkpoints import Checkpoint
from common.checkpoints.prediction import predict
from common.errors import CheckpointError, InputError, SpecError, WeightsError
from common.images import PRESETS, sample_photos
from common.parity.case import Case
from common.parity.session import Session
from common.sources.known_weights import table
from tests.scripts import printed

PHOTOS = tuple(sample_photos())
# variant: parameters without and with auxiliary heads, statistics of both, arrays of both with counters, multiply-adds
TORCHVISION = ((6_624_904, 13_004_888), (14_560, 15_072), (344, 364), 1_498_376_192)
COUNTS = {
    **dict.fromkeys(("googlenet", "googlenet.no_aux", "googlenet.transform_input"), TORCHVISION),
    "googlenet.caffe": ((6_998_552, 13_378_280), (0, 0), (116, 128), 1_582_671_872),
    # One class more, and no scale in 57 norms of 7,280 channels.
    "googlenet.slim": ((6_618_649, 13_000_427), (14_560, 15_072), (287, 305), 1_498_377_216),
}
SMALL = GoogLeNetSpec(
    stem=(6, 6, 8),
    stages=(1, 3, 1),
    widths=((6, 6, 8, 6, 6, 6),) * 5,
    aux_widths=(6, 24),
    aux_dropout=0.5,
    classes=10,
)


def twin(spec: GoogLeNetSpec) -> GoogLeNetSpec:
    """Five modules of a few channels; where windows pool before the auxiliary heads, for maps of 5 by 8 pixels."""
    fields = {
        name: getattr(SMALL, name) for name in ("stem", "stages", "widths", "aux_widths", "aux_dropout", "classes")
    }
    return spec.replace(**fields, aux_map=(1, 2) if spec.aux_pool == "window" else spec.aux_map)


def checkpoint(spec: GoogLeNetSpec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0), preprocessing=PRESETS["torchvision"])


def same(found: Checkpoint, made: Checkpoint) -> bool:
    return all(np.array_equal(found.weights[name], made.weights[name]) for name in canonical.shapes(found.spec))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_statistics_and_multiply_adds_are_the_published_ones(name):
    parameters, statistics, keys, operations = COUNTS[name]
    for aux in (False, True):
        spec = architectures.find(name).replace(aux=aux)
        used = running(spec, training=False)
        shapes = output_shapes(used, (224, 224, 3))
        norms = sum(layer.kind == "norm" for layer in spec.layers)
        assert sum(layer.parameter_count for layer in spec.layers) == parameters[aux]
        assert sum(prod(s) for layer in spec.layers for s in layer.statistics.values()) == statistics[aux]
        assert len(canonical.shapes(spec)) + norms == keys[aux]
        assert sum(multiply_adds(used, shapes).values()) == operations
        assert [shapes[path][::2] for path in spec.stage_outputs] == [(28, 480), (14, 832), (7, 1024)]
        assert sum(layer.kind == "conv" for layer in used) == 57
        assert [path for group in spec.layer_groups for path in group] == [layer.path for layer in spec.layers]
    true_5x5 = architectures.find("googlenet.no_aux").replace(large_kernel=5)
    assert sum(layer.parameter_count for layer in true_5x5.layers) == 7_005_832


def test_auxiliary_heads_stand_behind_4a_and_4d_run_in_training_alone_and_the_last_comes_first():
    spec = VARIANTS["googlenet"]
    by_path = {layer.path: layer for layer in spec.layers}
    assert by_path["aux1.pool"].inputs == by_path["inception4b.branch1"].inputs == ("inception4a.concat",)
    assert by_path["aux2.pool"].inputs == by_path["inception4e.branch1"].inputs == ("inception4d.concat",)
    assert outputs(spec, training=True) == ("head.fc", "aux2.fc2", "aux1.fc2")
    assert outputs(spec, training=False) == ("head.fc",)
    assert {layer.path.partition(".")[0] for layer in spec.layers if layer.training_only} == {"aux1", "aux2"}
    fewer = spec.with_head(classes=7)
    assert [layer.out_features for layer in fewer.layers if layer.path.endswith((".fc", ".fc2"))] == [7] * 3
    for bare in (spec.with_head(head="none"), spec.exact_twin):
        assert not bare.aux


def test_of_caffe_are_the_norms_behind_the_first_pool_and_before_the_second():
    spec = VARIANTS["googlenet.caffe"]
    norms = [(x.path, x.inputs[0], x.size, x.alpha, x.beta, x.k) for x in spec.layers if x.kind == "lrn"]
    numbers = (5, 2e-5, 0.75, 1.0)
    assert norms == [("stem.lrn1", "stem.pool1", *numbers), ("stem.lrn2", "stem.conv3_relu", *numbers)]
    # A true 5x5, a last pool of 3x3, and windows of 5x5 before its auxiliary heads.
    found = {x.path: x.kernel for x in spec.layers if hasattr(x, "kernel")}
    assert (found["inception5b.branch3"], found["inception4e.pool"], found["aux2.pool"]) == (5, 3, 5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stages": (1, 3)}, "stages=(1, 3) is not allowed in a googlenet spec; expected a list of three"),
        ({"stages": (1, 27, 1)}, "expected a list of three integers from 1 to 26"),
        ({"stages": (2, 3, 1)}, "expected 6 entries, one for each module of stages"),
        ({"widths": SMALL.widths[1:]}, "expected 5 entries, one for each module of stages"),
        ({"stages": (2, 2, 1)}, "aux=True is not allowed in a googlenet spec; expected false unless the second stage"),
        ({"large_kernel": 4}, "large_kernel=4 is not allowed in a googlenet spec; expected one of 3, 5"),
        ({"transform_input": True, "in_channels": 1}, "expected false unless in_channels=3"),
        ({"head": "none"}, "aux=True is not allowed in a googlenet spec; expected false with head none"),
        ({"head_pool": "none"}, "expected average or max with head logits"),
        ({"aux_map": (4,)}, "aux_map=(4,) is not allowed"),
    ],
    ids=str,
)
def test_a_contradiction_is_one_line_with_field_and_value(changes, expected):
    with pytest.raises(SpecError) as caught:
        SMALL.replace(**changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_takes_images_from_15_pixels_up_as_torchvisions_does_and_in_training_what_its_heads_take():
    spec = VARIANTS["googlenet"]
    assert output_shapes(spec.layers, (15, 15, 3))["inception5b.concat"] == (1, 1, 1024)
    with pytest.raises(
        InputError, match=r"14x20 is too small: nothing is left of it at inception3b.pool; use a larger"
    ):
        output_shapes(spec.layers, (14, 20, 3))
    caffe = VARIANTS["googlenet.caffe"]
    assert output_shapes(running(caffe, training=False), (64, 64, 3))
    with pytest.raises(InputError, match=r"64x64 is too small: nothing is left of it at aux1.pool"):
        output_shapes(running(caffe, training=True), (64, 64, 3))
    with pytest.raises(InputError, match=r"96x96 does not fit: aux1.fc1 expects 2048 features and gets 128"):
        output_shapes(running(caffe, training=True), (96, 96, 3))


def test_pytorch_has_torchvisions_names_keywords_and_initialisation():
    import torch

    import resnet_torch

    with torch.device("meta"):
        model = resnet_torch.googlenet(weights=None, progress=False, num_classes=7, dropout=0.1, dropout_aux=0.3)
        bare = resnet_torch.googlenet(aux_logits=False, transform_input=True, init_weights=False)
    assert model.spec == VARIANTS["googlenet"].replace(classes=7, dropout=0.1, aux_dropout=0.3)
    assert bare.spec == VARIANTS["googlenet.transform_input"].replace(aux=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert (len(shapes), len(bare.state_dict())) == (364, 344)
    assert list(shapes)[:2] == ["conv1.conv.weight", "conv1.bn.weight"]
    assert list(shapes)[-4:] == ["aux2.fc2.weight", "aux2.fc2.bias", "fc.weight", "fc.bias"]
    assert shapes["inception3a.branch3.1.conv.weight"] == (32, 16, 3, 3)
    assert shapes["inception5b.branch4.1.bn.running_var"] == (128,)
    assert (shapes["aux1.conv.conv.weight"], shapes["aux2.conv.conv.weight"]) == ((128, 512, 1, 1), (128, 528, 1, 1))
    assert (shapes["aux1.fc1.weight"], shapes["aux1.fc2.weight"]) == ((1024, 2048), (7, 1024))

    state = resnet_torch.from_spec(SMALL.replace(aux_widths=(6, 300))).state_dict()
    kernel, bias = state["aux1.fc1.weight"], state["aux1.fc1.bias"]
    assert float(kernel.std()) == pytest.approx(0.01, rel=0.05)
    assert 0.9 * 96**-0.5 < float(bias.abs().max()) <= 96**-0.5
    assert float(state["inception4b.branch2.1.conv.weight"].std()) == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("name", ["googlenet.transform_input", "googlenet.caffe", "googlenet.slim"])
def test_pytorch_returns_the_logits_and_in_training_those_of_its_heads_and_can_be_scripted(name):
    import torch

    import resnet_torch

    spec = twin(VARIANTS[name]).replace(aux=True)
    model, images = resnet_torch.from_spec(spec), torch.randn(2, 3, 80, 129)
    shapes = output_shapes(spec.layers, (80, 129, 3))
    assert [tuple(x.shape[i] for i in (2, 3, 1)) for x in model.stages(images)] == [
        shapes[path] for path in spec.stage_outputs
    ]
    kept: dict[str, torch.Tensor] = {}
    for head in ("aux1", "aux2"):
        hook = partial(lambda head, module, inputs, output: kept.update({head: output}), head)
        model.get_submodule(head).register_forward_hook(hook)
    trained = model(images)
    assert trained._fields == ("logits", "aux_logits2", "aux_logits1")
    assert trained.aux_logits2 is kept["aux2"]
    assert trained.aux_logits1 is kept["aux1"]
    scripted = torch.jit.script(resnet_torch.from_spec(spec))
    assert scripted(images)._fields == trained._fields
    scripted.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(scripted.eval()(images), model.eval()(images))
    alone = resnet_torch.from_spec(spec.replace(aux=False)).train()
    assert alone(images).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimised")
def test_flax_returns_the_same_under_the_names_of_the_spec():
    import jax
    import jax.numpy as jnp

    import resnet_flax

    assert resnet_flax.GoogLeNet(num_classes=7, aux=False).spec == VARIANTS["googlenet.no_aux"].replace(classes=7)
    spec = SMALL.replace(transform_input=True, aux_dropout=0.0, dropout=0.0)
    model, images = resnet_flax.from_spec(spec), jnp.ones((2, 33, 40, 3))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)
    assert set(variables["params"]) == {layer.path for layer in spec.layers if layer.parameters}
    assert float(jnp.std(variables["params"]["aux1.fc1"]["kernel"])) == pytest.approx(0.01, rel=0.05)
    assert 0.7 * 96**-0.5 < float(abs(variables["params"]["aux1.fc1"]["bias"]).max()) <= 96**-0.5

    def run(train):
        call = partial(model.apply, train=train, mutable=["intermediates", "batch_stats"])
        return jax.eval_shape(call, variables, images)

    logits, state = run(False)
    shapes = output_shapes(spec.layers, (33, 40, 3))
    assert logits.shape == (2, 10)
    assert [x.shape[1:] for x in state["intermediates"]["stages"]] == [shapes[path] for path in spec.stage_outputs]
    found, _ = run(True)  # their order shows in a check, where each counts otherwise
    assert [x.shape for x in found] == [(2, 10)] * 3


KERAS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures, checkpoints
found = {}
model = resnet_keras.GoogLeNet(include_top=False, pooling="avg")
found["bare"] = model.output.shape, model.count_params()
found["classes"] = resnet_keras.GoogLeNet(classes=7, input_shape=(64, 64, 3)).output.shape
given = checkpoints.read("FOLDER/a.safetensors")
images = np.random.default_rng(0).normal(size=(2, 64, 65, 3))
one = resnet_keras.from_spec(given.spec, weights=given)
found["outputs"] = one.output_names if hasattr(one, "output_names") else []
logits = one.predict(images, verbose=0)
found["shapes"] = [x.shape for x in logits]
heads = keras.Model(one.input, [one.get_layer(name).output for name in ("fc", "aux2_fc2", "aux1_fc2")])
found["order"] = all(bool((a == b).all()) for a, b in zip(logits, heads.predict(images, verbose=0)))
one.save("FOLDER/a.keras")
again = keras.models.load_model("FOLDER/a.keras").predict(images, verbose=0)
found["saved"] = all(bool((a == b).all()) for a, b in zip(logits, again))
for file in ("b.weights.h5", "b.h5"):
    fresh = resnet_keras.from_spec(given.spec)
    fresh.load_weights("FOLDER/" + file)
    found[file] = all(bool((a == b).all()) for a, b in zip(logits, fresh.predict(images, verbose=0)))
alone = resnet_keras.from_spec(given.spec.replace(aux=False), weights=given)
found["alone"] = bool((alone.predict(images, verbose=0) == logits[0]).all())
found["first"] = resnet_keras.from_spec(given.spec, data_format="channels_first").output_shape
print(json.dumps(found))
"""


@pytest.mark.slow
def test_keras_models_have_a_list_of_outputs_and_load_what_is_written_for_them(session, tmp_path):
    made = checkpoint(SMALL)
    checkpoints.write(tmp_path / "a.safetensors", made)
    for file in ("b.weights.h5", "b.h5"):
        checkpoints.write(tmp_path / file, made, "keras")
    found = printed(session, "keras:tensorflow", KERAS.replace("FOLDER", str(tmp_path)))
    assert found["bare"] == [[None, 1024], 6_624_904 + 14_560 - 1_025_000]
    assert found["classes"] == [None, 7]
    assert found["shapes"] == [[2, 10]] * 3
    assert found["first"] == [[None, 10]] * 3
    assert [found[key] for key in ("order", "saved", "b.weights.h5", "b.h5", "alone")] == [True] * 5


@pytest.mark.parametrize(
    "spec", [SMALL, SMALL.replace(aux=False, aux_widths=(128, 1024), bn_scale=False), twin(VARIANTS["googlenet.caffe"])]
)
@pytest.mark.parametrize(
    ("file", "to"),
    [
        *(("a.pth", "torchvision"), ("a.safetensors", "torchvision"), ("a.safetensors", "canonical")),
        *(("a.pth", "caffe"), ("a.safetensors", "caffe")),
        *(("a.h5", "keras"), ("a.weights.h5", "keras"), ("a.msgpack", "flax")),
    ],
)
def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(tmp_path, file, to, spec):
    made = checkpoint(spec)
    if to == "caffe" and spec.norm:
        with pytest.raises(CheckpointError, match=r"Caffe has no name for stem.conv1_norm, a layer of this googlenet"):
            checkpoints.write(tmp_path / file, made, to)
        return
    written = checkpoints.write(tmp_path / file, made, to)
    # What shapes cannot say and a reader takes for something else is told, and can be said.
    assert ("transform_input" in written.fields) == (to == "torchvision")
    changes = dict(written.fields)
    found = checkpoints.read(tmp_path / file, changes=changes or None)
    assert (found.spec, found.origin.format) == (spec, to)
    assert same(found, made)


def test_a_file_of_torchvision_has_heads_that_a_network_may_do_without(tmp_path):
    made = checkpoint(SMALL.replace(transform_input=True))
    checkpoints.write(tmp_path / "a.pth", made)
    found = checkpoints.read(tmp_path / "a.pth")
    assert found.spec.replace(aux_dropout=0.5) == made.spec  # the rates of its dropouts are free
    assert found.preprocessing == PRESETS["torchvision"]
    assert found.origin.assumed["transform_input"] is True
    assert {"stem_padding", "pool_padding", "last_pool", "lrn", "aux_pool"} <= found.origin.assumed.keys()
    assert not {"large_kernel", "norm", "bn_scale", "aux", "widths"} & found.origin.assumed.keys()
    without = checkpoints.read_for(made.spec.replace(aux=False), tmp_path / "a.pth")
    assert same(without, made)
    checkpoints.write(tmp_path / "b.pth", checkpoint(made.spec.replace(aux=False)))
    with pytest.raises(WeightsError, match="aux is False there and True here"):
        checkpoints.read_for(made.spec, tmp_path / "b.pth")
    # All heads have the new number of classes, and what is before them is as it was.
    changed = checkpoints.read(tmp_path / "a.pth", classes=7)
    shapes = canonical.shapes(changed.spec)
    assert [shapes[f"{head}.kernel"][1] for head in ("head.fc", "aux1.fc2", "aux2.fc2")] == [7] * 3
    assert all("fc" in name for name in shapes if not np.array_equal(changed.weights[name], made.weights[name]))
    assert "aux1.fc2.kernel" in changed.origin.notes[0]


def test_a_builder_with_weights_leaves_heads_off_and_transforms_its_input_unless_it_is_told(tmp_path):
    import torch

    import resnet_torch

    spec = VARIANTS["googlenet"].replace(classes=3)
    with torch.device("meta"):
        meta = resnet_torch.from_spec(spec).state_dict()
    torch.save(
        {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in meta.items()}, tmp_path / "a.pth"
    )
    for options, aux, transform in (
        ({}, False, True),
        ({"aux_logits": True}, True, True),
        ({"transform_input": False}, False, False),
    ):
        model = resnet_torch.googlenet(weights=tmp_path / "a.pth", num_classes=3, **options)
        assert model.spec == spec.replace(aux=aux, transform_input=transform)


@pytest.mark.slow
def test_predict_works_from_a_state_dict_with_heads(tmp_path):
    import torch

    import resnet_torch

    model = resnet_torch.from_spec(SMALL.replace(transform_input=True)).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    found = predict(checkpoints.read(tmp_path / "a.pth"), PHOTOS[:1], ("torch",))
    assert found.probabilities[0].shape == (1, 10)


def test_names_of_caffe_say_that_they_are_caffes_network(tmp_path):
    spec = twin(VARIANTS["googlenet.caffe"]).replace(aux_map=(4, 4))
    made = checkpoint(spec)
    checkpoints.write(tmp_path / "a.safetensors", made, "caffe")
    stored = load_file(tmp_path / "a.safetensors")
    assert stored["inception_3a/5x5.weight"].shape == (6, 6, 5, 5)
    assert {"conv1/7x7_s2.bias", "loss1/conv.weight", "loss2/fc.weight", "loss3/classifier.bias"} <= stored.keys()
    rows = made.weights["aux1.fc1.kernel"].reshape(4, 4, 6, 24)
    assert np.array_equal(stored["loss1/fc.weight"], rows.transpose(3, 2, 0, 1).reshape(24, -1))
    found = checkpoints.read(tmp_path / "a.safetensors")
    assert found.spec.replace(aux_dropout=0.5) == spec
    assert found.preprocessing == PRESETS["caffe"]
    stored.pop("inception_4b/1x1.weight")
    save_file(stored, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"no kernel of inception4b\.branch1 is there; is the file whole\?"):
        checkpoints.read(tmp_path / "b.safetensors")
    left = {name: array for name, array in stored.items() if not name.startswith("inception_4b")}
    save_file(left, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="have a gap: number 1 is missing, and 2 is there"):
        checkpoints.read(tmp_path / "c.safetensors")


def test_published_weights_are_torchvisions():
    (known,) = [entry for entry in table() if entry.spec.family == "googlenet"]
    assert known.spec == VARIANTS["googlenet.transform_input"]
    assert (known.checksum, known.top1) == ("sha256:1378be20", 69.778)
    assert CONVENTIONS["transform_input"] == {"transform_input": True}


# The first has what torchvision's other variants have, but for what leaves something off.
KINDS = ("googlenet.transform_input", "googlenet.caffe", "googlenet.slim")


@pytest.mark.slow
@pytest.mark.parametrize("name", [KINDS[0], *(pytest.param(name, marks=pytest.mark.long) for name in KINDS[1:])])
def test_every_kind_of_googlenet_is_one_function_in_three_frameworks(session: Session, name: str) -> None:
    spec = twin(VARIANTS[name])
    size = (80, 129) if spec.aux_pool == "window" else (64, 65)
    result = session.check(Case(variant=name, spec=spec, size=size, photos=PHOTOS, dtypes=("float64",)))
    assert result.passed, explain(result)
