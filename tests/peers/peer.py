"""A peer library at work, in a process of its own: torchvision, timm, transformers, keras.applications, or Flax.

    python peer.py LIBRARY MODEL make FILE                     its model with random weights, saved by its own code
    python peer.py LIBRARY MODEL run FILE OUT IMAGES [IMAGES…]  loaded strictly by its own loader; float64 outputs

IMAGES are safetensors files with "images" (N, H, W, C); OUT gets "0", "1", … with the outputs of each.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_BACKEND": "tensorflow"}
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
from safetensors.numpy import load_file, save_file

Run = Callable[[np.ndarray], np.ndarray]


def drawn(name: str, shape: tuple[int, ...], fan_in: int, damped: bool, generator: np.random.Generator) -> np.ndarray:
    """Random values that no default has and that keep the size of what passes through, whatever the depth."""
    if len(shape) > 1:
        return generator.standard_normal(shape) * np.sqrt(2 / fan_in)
    if name.endswith(("var", "variance")):
        return generator.uniform(0.5, 1.5, shape)
    if name.endswith(("scale", "gamma")):
        return generator.uniform(0.5, 1.5, shape) * (0.2 if damped else 1.0)
    return generator.normal(0, 0.2, shape)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def randomize_torch(model: Any) -> None:
    import torch

    generator = np.random.default_rng(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            norm = tensor.dim() == 1 and name.endswith(".weight")
            last = any(part in name for part in ("bn3.", "layer.2.normalization.")) or (
                "bn2." in name and not any("bn3." in other for other in model.state_dict())
            )
            role = "scale" if norm else name
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
            tensor.copy_(torch.from_numpy(drawn(role, tuple(tensor.shape), fan_in, last, generator)))


def run_torch(model: Any, output: Callable[[Any], Any] = lambda result: result) -> Run:
    import torch

    torch.set_num_threads(2)
    model.double().eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return output(model(torch.from_numpy(images).permute(0, 3, 1, 2))).numpy()

    return run


def _torchvision(name: str) -> Any:
    import torchvision
    from torch import nn

    if name == "inception_v3":  # its own initialisation takes a while
        return torchvision.models.get_model(name, weights=None, init_weights=False)
    if name == "googlenet":
        # As its function makes it for published weights, but for the heads, which it then leaves off.
        return torchvision.models.googlenet(init_weights=False, transform_input=True)
    if not name.startswith(("vgg", "alexnet")):
        return torchvision.models.get_model(name, weights=None)
    # As wide as it is it takes half a gigabyte.
    options = {"init_weights": False} if name.startswith("vgg") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    dense = [index for index, module in enumerate(model.classifier) if isinstance(module, nn.Linear)]
    widths = (model.classifier[dense[0]].in_features, 256, 128, 1000)
    for number, index in enumerate(dense):
        model.classifier[index] = nn.Linear(*widths[number : number + 2])
    return model


def make_torchvision(name: str, path: Path) -> None:
    import torch

    model = _torchvision(name)
    randomize_torch(model)
    torch.save(model.state_dict(), path)


def load_torchvision(name: str, path: Path) -> Run:
    import torch

    model = _torchvision(name)
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return run_torch(model)


def _timm(name: str) -> Any:
    import timm

    narrow = {"mlp_ratio": 1 / 16} if name.startswith("vgg") else {}
    return timm.create_model(name, pretrained=False, **narrow)


def make_timm(name: str, path: Path) -> None:
    import safetensors.torch
    import torch

    model = _timm(name)
    randomize_torch(model)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict(), "epoch": 3, "arch": name}, path)


def load_timm(name: str, path: Path) -> Run:
    import timm

    model = _timm(name)
    timm.models.load_checkpoint(model, str(path), strict=True)
    return run_torch(model)


_HUGGING_FACE = {"resnet-18": ("basic", [2, 2, 2, 2], 1), "resnet-50": ("bottleneck", [3, 4, 6, 3], 4)}


def make_transformers(name: str, path: Path) -> None:
    import transformers

    labels = {number: f"label {number}" for number in range(1000)}
    if name == "efficientnet-b0":
        scaling = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
        b0 = transformers.EfficientNetConfig(**scaling, dropout_rate=0.2, id2label=labels)
        model = transformers.EfficientNetForImageClassification(b0)
    else:
        block, depths, expansion = _HUGGING_FACE[name]
        sizes = [expansion * width for width in (64, 128, 256, 512)]
        config = transformers.ResNetConfig(layer_type=block, depths=depths, hidden_sizes=sizes, id2label=labels)
        model = transformers.ResNetForImageClassification(config)
    randomize_torch(model)
    model.save_pretrained(path.parent)


def load_transformers(name: str, path: Path) -> Run:
    from transformers import AutoModelForImageClassification

    model, told = AutoModelForImageClassification.from_pretrained(path.parent, output_loading_info=True)
    wrong = {key: told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[key]}
    if wrong:
        raise SystemExit(f"not a whole checkpoint: {wrong}")
    return run_torch(model, lambda result: result.logits)


# --- Keras -----------------------------------------------------------------------------------------------------------


# What the published files of EfficientNet hold: the deviations, under the name of variances.
_PUBLISHED = {"mean": (0.485, 0.456, 0.406), "variance": (0.229, 0.224, 0.225), "count": 0}


def make_keras(name: str, path: Path) -> None:
    model = _keras_of_any_size(name, "float32")
    generator = np.random.default_rng(0)
    for variable in model.weights:
        if variable.path.startswith("normalization/"):
            variable.assign(_PUBLISHED[variable.name])
            continue
        shape = tuple(variable.shape)
        fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        variable.assign(drawn(variable.name, shape, fan_in, "_3_bn" in variable.path, generator).astype(np.float32))
    if path.suffix == ".keras":
        model.save(path)
    else:
        model.save_weights(path)


def load_keras(name: str, path: Path) -> Run:
    import keras

    single = keras.models.load_model(path) if path.suffix == ".keras" else _keras_of_any_size(name, "float32")
    if path.suffix != ".keras":
        single.load_weights(path)
    # Keras numbers the layers that its applications give no name.
    weights = {_unnumbered(layer.name, single): layer.get_weights() for layer in single.layers}
    models: dict[Any, Any] = {}

    def run(images: np.ndarray) -> np.ndarray:
        # EfficientNet takes a size that it does not know for an even one, and pads so.
        size = images.shape[1:3] if name.startswith("EfficientNet") else None
        if size not in models:
            models[size] = _in_float64(_keras_of_any_size(name, "float64", size), weights)
        return np.asarray(models[size](images, training=False))

    return run


_NUMBERED = re.compile(r"(normalization|conv2d|batch_normalization)(?:_(\d+))?")


def _unnumbered(name: str, model: Any) -> str:
    """The name of a layer, whose number is its rank among those of its kind in the model."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return name
    others = (_NUMBERED.fullmatch(layer.name) for layer in model.layers)
    return f"{match[1]}/{sum(int(o[2] or 0) < int(match[2] or 0) for o in others if o and o[1] == match[1])}"


def _in_float64(model: Any, weights: dict[str, list[np.ndarray]]) -> Any:
    for layer in model.layers:  # by name: a file's model may have its layers in another order
        if hasattr(layer, "finalize_state"):  # it reads its variables only then; its numbers as people wrote them
            mean, variance, count = weights["normalization/0"]
            exact = [np.array([float(str(number)) for number in value]) for value in (mean, variance)]
            layer.set_weights([*exact, count])
            layer.finalize_state()
        elif layer.weights:
            layer.set_weights([value.astype(np.float64) for value in weights[_unnumbered(layer.name, model)]])
        elif hasattr(layer, "scale"):  # numbers, which would be rounded to float32
            layer.scale = np.asarray(layer.scale, np.float64)
    return model


def _keras_of_any_size(name: str, dtype: str, size: tuple[int, ...] | None = None) -> Any:
    import keras

    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    # With its top, keras.applications wants a size; the top itself takes any, but for one that flattens.
    tensor = keras.Input((*(size or ((64, 32) if name.startswith("VGG") else (None, None))), 3))
    if not name.startswith("EfficientNet"):
        return getattr(keras.applications, name)(weights=None, input_tensor=tensor)
    # What normalises the images is another thing where published weights are to come: as it is with them.
    from keras.src.applications import efficientnet

    with (
        patch.object(efficientnet.file_utils, "get_file", lambda *arguments, **options: ""),
        patch.object(keras.Model, "load_weights", lambda *arguments: None),
    ):
        return getattr(keras.applications, name)(weights="imagenet", input_tensor=tensor)


# --- Flax ------------------------------------------------------------------------------------------------------------


def _flax(name: str) -> tuple[Any, Any]:
    import jax
    from flax_twin import ResNet

    jax.config.update("jax_enable_x64", True)
    model = ResNet(name)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)))


def make_flax(name: str, path: Path) -> None:
    import jax
    from flax import serialization

    _, shapes = _flax(name)
    generator = np.random.default_rng(0)

    def value(keys: Any, leaf: Any) -> np.ndarray:
        role = keys[-1].key
        damped = any(getattr(key, "key", "") == "BatchNorm_2" for key in keys)
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1
        return drawn(role, leaf.shape, fan_in, damped, generator).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(value, shapes)
    if path.suffix == ".msgpack":
        path.write_bytes(serialization.to_bytes(variables))
        return
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), variables)


def load_flax(name: str, path: Path) -> Run:
    import jax
    from flax import serialization

    model, shapes = _flax(name)
    if path.suffix == ".msgpack":
        target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        variables = serialization.from_bytes(target, path.read_bytes())
    else:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(path.absolute(), shapes)
    variables = jax.tree.map(lambda array: np.asarray(array, np.float64), variables)
    return lambda images: np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images))


LIBRARIES = {
    "torchvision": (make_torchvision, load_torchvision),
    "timm": (make_timm, load_timm),
    "transformers": (make_transformers, load_transformers),
    "keras": (make_keras, load_keras),
    "flax": (make_flax, load_flax),
}


def main() -> None:
    library, model, operation, file = sys.argv[1:5]
    make, load = LIBRARIES[library]
    if operation == "make":
        make(model, Path(file))
        return
    run = load(model, Path(file))
    outputs = [run(load_file(path)["images"]) for path in sys.argv[6:]]
    save_file({str(index): np.ascontiguousarray(output) for index, output in enumerate(outputs)}, sys.argv[5])


if __name__ == "__main__":
    main()
