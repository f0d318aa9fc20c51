"""The forms of ResNet beyond torchvision's: timm's, the plain networks, and the gallery of what tutorials teach."""

from math import prod

import numpy as np
import pytest

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures.layers import multiply_adds, output_shapes
from common.checkpoints import Checkpoint
from common.errors import CheckpointError, SpecError
from common.names.resnet import TIMM, TORCHVISION

# Parameters and tensors: timm's models of these names, by its own count.
OF_TIMM = {
    "resnet18d": (11_708_744, 134),
    "resnet34d": (21_816_904, 230),
    "resnet50d": (25_576_264, 332),
    "resnet101d": (44_568_392, 638),
    "resnet152d": (60_212_040, 944),
    "seresnet18": (11_779_624, 154),
    "seresnet34": (21_960_416, 282),
    "seresnet50": (28_088_024, 384),
    "seresnet101": (49_326_872, 758),
    "seresnet152": (66_821_848, 1132),
}
FORMS = [
    *("resnet50d", "resnet18d", "seresnet50", "seresnet18", "plain20", "resnet18.shared_conv"),
    *(
        "resnet18.unused_projection",
        "resnet18.shared_norm",
        "resnet50.shared_norm",
        "resnet18.early_relu",
        "resnet50.no_last_relu",
    ),
]


def small(name: str):
    spec = architectures.find(name)
    if name.startswith("plain"):
        return spec
    deep = {"deep_stem": (6, 7)} if spec.deep_stem else {}
    squeeze = {"squeeze": (2, 3, 4, 5)} if spec.squeeze else {}
    return spec.replace(widths=(8, 12, 16, 20), stem_width=10, classes=7, **deep, **squeeze)


def count(name: str) -> int:
    return sum(layer.parameter_count for layer in architectures.find(name).layers)


class TestSpec:
    @pytest.mark.parametrize("name", OF_TIMM)
    def test_parameters_are_those_of_timms_model(self, name):
        assert count(name) == OF_TIMM[name][0]

    @pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
    def test_a_plain_network_has_the_parameters_and_operations_of_the_residual_one(self, depth):
        plain, residual = (architectures.find(f"{kind}{depth}") for kind in ("plain", "resnet"))
        assert canonical.shapes(plain) == canonical.shapes(residual)
        operations = [
            sum(multiply_adds(spec.layers, output_shapes(spec.layers, (32, 32, 3))).values())
            for spec in (plain, residual)
        ]
        assert operations[0] == operations[1]
        assert not any(layer.kind in ("add", "zero_pad") for layer in plain.layers)

    def test_what_sharing_saves_is_what_the_second_layers_have(self):
        full = architectures.find("resnet18")
        seconds = [layer for layer in full.layers if layer.path.endswith(("blocks.0.norm2", "blocks.1.norm2"))]
        saved = sum(layer.parameter_count for layer in seconds)
        assert count("resnet18") - count("resnet18.shared_norm") == saved
        # Of eight blocks three widen and keep theirs.
        shared = [layer for layer in architectures.find("resnet18.shared_conv").layers if layer.shares]
        assert [layer.kind for layer in shared] == ["conv", "norm"] * 5
        statistics = sum(
            prod(s) for layer in architectures.find("resnet18.shared_norm").layers for s in layer.statistics.values()
        )
        assert statistics == 9_600 - saved

    @pytest.mark.parametrize(
        ("name", "changes", "expected"),
        [
            (
                "resnet18",
                {"squeeze": (4,)},
                "squeeze=(4,) is not allowed in a resnet spec; expected 4 entries, as many",
            ),
            ("resnet20", {"shortcut_pool": True}, "shortcut_pool=True is not allowed in a resnet spec; expected false"),
            (
                "plain20",
                {"relu_after_add": False},
                "relu_after_add=False is not allowed in a resnet spec; expected true",
            ),
            ("plain20", {"unused_projection": True}, "expected false without projections"),
            ("plain20", {"relu_before_add": True}, "expected false without a shortcut"),
            ("resnet50d", {"replace_stride_with_dilation": (False, True, True)}, "expected false with dilation"),
            ("resnet18.shared_norm", {"norm": False}, "expected none or conv where norm is false"),
        ],
        ids=str,
    )
    def test_a_contradiction_is_one_line_with_field_and_value(self, name, changes, expected):
        with pytest.raises(SpecError) as caught:
            architectures.find(name).replace(**changes)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


class TestNames:
    @pytest.mark.parametrize("name", FORMS)
    @pytest.mark.parametrize(
        ("file", "to"),
        [
            ("a.pth", "torchvision"),
            ("a.safetensors", "timm"),
            ("a.h5", "keras_classic"),
            ("a.weights.h5", "keras_applications"),
            ("a.msgpack", "flax"),
        ],
    )
    def test_a_file_in_any_names_gives_back_every_bit_and_what_shapes_show(self, tmp_path, name, file, to):
        spec = small(name)
        made = Checkpoint(spec=spec, weights=canonical.randomize(spec))
        checkpoints.write(tmp_path / file, made, to)
        found = checkpoints.read(tmp_path / file)
        assert all(np.array_equal(found.weights[array], made.weights[array]) for array in made.weights)
        shown = ("deep_stem", "squeeze", "shared", "shortcut_pool", "unused_projection", "blocks", "widths")
        assert all(getattr(found.spec, field) == getattr(spec, field) for field in shown)
        for field in ("shortcut", "relu_before_add", "relu_after_add"):
            assert getattr(found.spec, field) == getattr(spec, field) or field in found.origin.assumed

    def test_timms_projections_stand_behind_a_pool(self):
        spec = small("resnet50d")
        names = TIMM.layers(spec)
        assert (names["stem.conv"], names["stem.conv2"], names["stem.norm2"]) == ("conv1.6", "conv1.3", "conv1.4")
        assert names["stages.1.blocks.0.shortcut.pool"] == "layer2.0.downsample.0"
        assert names["stages.0.blocks.0.shortcut.conv"] == "layer1.0.downsample.1"
        assert names["stages.0.blocks.0.shortcut.norm"] == "layer1.0.downsample.2"
        assert TORCHVISION.layers(spec) == names

    def test_a_community_without_a_name_for_a_layer_says_so(self, tmp_path):
        spec = small("seresnet18")
        made = Checkpoint(spec=spec, weights=canonical.randomize(spec))
        with pytest.raises(CheckpointError, match="Hugging Face transformers has no name for stages"):
            checkpoints.write(tmp_path / "a.safetensors", made, "huggingface")
        assert not list(tmp_path.iterdir())


class TestPyTorch:
    @pytest.mark.parametrize("name", ["resnet50d", "seresnet18", "resnet18d", "seresnet152"])
    def test_names_and_their_number_are_timms(self, name):
        import torch

        import resnet_torch

        with torch.device("meta"):
            state = resnet_torch.from_spec(architectures.find(name)).state_dict()
        assert len(state) == OF_TIMM[name][1]
        expected = "layer2.0.downsample.2.running_var" if name.endswith("d") else "layer1.0.se.fc2.bias"
        assert expected in state

    @pytest.mark.parametrize("name", FORMS)
    def test_can_be_scripted(self, name):
        import torch

        import resnet_torch

        model = resnet_torch.from_spec(small(name)).eval()
        images = torch.randn(2, 3, 64, 65)
        with torch.no_grad():
            assert torch.equal(torch.jit.script(model)(images), model(images))
