"""What keras.applications offers, for a specification of any family: its arguments, and a model of features."""

from collections.abc import Callable
from os import PathLike
from typing import Any

import keras

import resnet_keras
from common.architectures import Spec
from common.checkpoints import adopted
from resnet_keras.weights import layer_names, spec_of

_POOLINGS = {None: "none", "avg": "average", "max": "max"}
_DOC = """{variant} in the convention of keras.applications.

    `input_shape` is (height, width, channels), at least {smallest} pixels a side; with `include_top` it defaults to
    ({size}, {size}, 3) and must be static, without it to any size. `input_tensor` is a Keras tensor to build upon.
    Without `include_top` the model returns the last feature map, or with `pooling` "avg" or "max" a vector for each
    image. `classifier_activation` is any Keras activation, None for logits. `weights` is None, "imagenet", the path of
    a checkpoint of any known format, a URL, or a name as "torchvision:IMAGENET1K_V2"; its head is left out where the
    model has none, and the network takes its conventions.
    Raises `ValueError` for arguments that contradict each other, and its child `WeightsError` for unfit weights.
    """


def builder(variant: str, spec: Spec, default_size: int) -> Callable[..., keras.Model]:
    """A function that makes `spec`, whose channels, classes and head become arguments.

    `variant` is the default name of the model.
    """

    def build(
        include_top: bool = True,
        weights: str | PathLike[str] | None = None,
        input_tensor: Any = None,
        input_shape: tuple[int | None, ...] | None = None,
        pooling: str | None = None,
        classes: int = spec.classes,
        classifier_activation: Any = "softmax",
        name: str = variant,
    ) -> keras.Model:
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown; expected None, 'avg' or 'max'")
        shape = _input_shape(input_shape, default_size, spec.output_stride, include_top and input_tensor is None)
        if input_tensor is None:
            channels = shape[-1]
        else:
            if not keras.utils.is_keras_tensor(input_tensor):
                input_tensor = keras.Input(tensor=input_tensor, shape=shape)
            found = tuple(input_tensor.shape[1:])
            if input_shape and not _agree(found, shape):
                raise ValueError(f"input_shape={shape} contradicts input_tensor, whose shape is {found}; give only one")
            channels = found[-1]

        activation = keras.activations.get(classifier_activation)
        if not include_top:
            head: dict[str, Any] = {"head": "none", "head_pool": _POOLINGS[pooling]}
        else:
            softmax = activation is keras.activations.softmax
            head = {"head": "softmax" if softmax else "logits", "classes": classes}
        if weights == "imagenet":
            weights = "keras:imagenet" if include_top else "keras:imagenet:notop"
        taken, path = adopted(spec, weights, variant)
        options = {"input_tensor": input_tensor, "input_shape": shape, "weights": path, "name": name}
        model = resnet_keras.from_spec(taken.replace(in_channels=channels, **head), **options)
        if not include_top or activation in (keras.activations.softmax, keras.activations.linear):
            return model
        outputs = keras.layers.Activation(activation, name="prob")(model.output)
        activated = keras.Model(model.input, outputs, name=name)
        activated.spec = model.spec
        return activated

    build.__doc__ = _DOC.format(variant=variant, size=default_size, smallest=spec.output_stride)
    return build


def stage_outputs(model: keras.Model, spec: Spec | None = None) -> keras.Model:
    """A model with the same layers that returns the list of the stages' outputs, C2 to C5 for four stages.

    `spec` is needed only for a model that was not made here but read from a file.
    """
    known: Any = spec_of(model, spec)
    names = layer_names(known)
    outputs = [model.get_layer(names[path]).output for path in known.stage_outputs]
    return keras.Model(model.input, outputs, name=f"{model.name}_stages")


def _agree(shape: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    return len(shape) == len(other) and all(
        None in pair or len(set(pair)) == 1 for pair in zip(shape, other, strict=True)
    )


def _input_shape(
    shape: tuple[int | None, ...] | None, default_size: int, smallest: int, static: bool
) -> tuple[int | None, ...]:
    if not shape:
        return (default_size, default_size, 3) if static else (None, None, 3)
    if len(shape) != 3:
        raise ValueError(f"input_shape={shape!r} is not allowed; expected (height, width, channels)")
    if any(size is not None and size < smallest for size in shape[:2]):
        raise ValueError(f"input_shape={shape!r} is too small; expected at least {smallest}x{smallest} pixels")
    if static and None in shape:
        raise ValueError(f"input_shape={shape!r} leaves a size open; with include_top it must be static")
    return tuple(shape)
