"""What the packages of the backends offer: a builder for every variant, found by name, and nothing loaded before."""

import importlib
import inspect
import pickle
import sys
from pathlib import Path

import pytest

from common.architectures import title, variants
from common.backends.facade import Facade, families

PLAIN = [name for name in variants() if "." not in name]
PACKAGES = ("resnet_torch", "resnet_keras", "resnet_flax")


@pytest.fixture(params=PACKAGES)
def package(request):
    return importlib.import_module(request.param)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("resnet", "ResNet"),
        ("resnet50", "ResNet50"),
        ("wide_resnet50_2", "WideResNet50_2"),
        ("resnext101_64x4d", "ResNeXt101_64x4d"),
        ("resnet_v2", "ResNetV2"),
        ("resnet50v2", "ResNet50V2"),
        ("vgg", "VGG"),
        ("vgg16_bn", "VGG16_bn"),
        ("densenet121", "DenseNet121"),
        ("lenet5", "LeNet5"),
        ("alexnet", "AlexNet"),
        ("googlenet", "GoogLeNet"),
        ("efficientnet", "EfficientNet"),
        ("efficientnet_b0", "EfficientNetB0"),
        ("efficientnet_lite4", "EfficientNetLite4"),
        ("inception_v3", "InceptionV3"),
    ],
)
def test_titles_are_as_people_write_them(name, written):
    assert title(name) == written


def test_every_variant_of_every_family_has_a_builder_in_every_package(package):
    spelling = str if package.__name__ == "resnet_torch" else title
    assert {spelling(name) for name in PLAIN} <= set(package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert not [name for name in package.__all__ if not callable(getattr(package, name))]


def test_a_builder_is_one_function_under_its_public_name(package):
    name = "resnet18" if package.__name__ == "resnet_torch" else "ResNet18"
    build = getattr(package, name)
    assert build is getattr(package, name)
    assert (build.__module__, build.__qualname__) == (package.__name__, name)
    assert pickle.loads(pickle.dumps(build)) is build
    assert "resnet18" in inspect.getdoc(build)


def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'ResNet51'"):
        _ = package.ResNet51


def test_a_family_is_offered_once_a_package_has_a_module_of_its_name(tmp_path: Path, monkeypatch):
    (tmp_path / "some_backend").mkdir()
    (tmp_path / "some_backend" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("some_backend", "some_backend.resnet"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def facade() -> Facade:
        return Facade("some_backend", frameworks={}, spelling=title, others={})

    assert families("some_backend") == []
    assert facade().names == ["from_checkpoint", "from_spec"]
    (tmp_path / "some_backend" / "resnet.py").write_text(
        "def builder(variant):\n    return lambda: variant\ndef from_spec(spec, **options):\n    return spec, options\n"
    )
    importlib.invalidate_caches()
    offered = facade()
    assert "ResNet50" in offered.names
    assert not [name for name in offered.names if "." in name]
    importlib.import_module("some_backend")
    assert offered.find("WideResNet50_2")() == "wide_resnet50_2"
    spec = variants()["resnet50"]
    assert offered.from_spec(spec, deep=True) == (spec, {"deep": True})
