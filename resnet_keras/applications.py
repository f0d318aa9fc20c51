"""What keras.applications offers, for a specification of any family: its arguments, and a model of features."""

from collections.abc import Callable
from typing import Any, Literal

import keras

import resnet_keras
from common.architectures import Spec, least_size, output
from common.checkpoints import Checkpoint, Given, adopt, read_for, weights_for
from resnet_keras.layers import from_channels_last, to_channels_last
from resnet_keras.weights import layer_names, load_weights, spec_of

_POOLINGS: dict[str | None, Literal["none", "average", "max"]] = {None: "none", "avg": "average", "max": "max"}
_ORDERS = {"channels_last": "height, width, channels", "channels_first": "channels, height, width"}
_DOC = """{variant} in the convention of keras.applications.

    `input_shape` is (height, width, channels), at least {smallest} pixels a side; with `include_top` it defaults to
    {size}, of {channels} channels, and must be static, without it to any size. Where
    `keras.config.image_data_format()` is "channels_first", it is (channels, height, width), and the images and the
    features are in that order too.
    `input_tensor` is a Keras tensor to build upon. Without `include_top` the model returns the last feature map, or
    with `pooling` "avg" or "max" a vector for each image. `classifier_activation` is any Keras activation, None for
    logits. `weights` is None, "imagenet", the path of a checkpoint of any known format, a URL, or a name as
    "torchvision:IMAGENET1K_V2"; its head is left out where the model has none, and the network takes its conventions.
    Raises `ValueError` for arguments that contradict each other, and its child `WeightsError` for unfit weights.
    """


def builder(variant: str, spec: Spec, *, name: str = "") -> Callable[..., keras.Model]:
    """A function that makes `spec`, whose channels, classes, head and size become arguments.

    `name` is the default name of the model, or else that of the `variant`.
    """
    called = name or variant

    def build(
        include_top: bool = True,
        weights: Given | None = None,
        input_tensor: Any = None,
        input_shape: tuple[int | None, ...] | None = None,
        pooling: str | None = None,
        classes: int = spec.classes,
        classifier_activation: Any = "softmax",
        name: str = called,
    ) -> keras.Model:
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown; expected None, 'avg' or 'max'")
        data_format = keras.config.image_data_format()
        shape = _input_shape(input_shape, spec, data_format, static=include_top and input_tensor is None)
        if input_tensor is not None:
            if not keras.utils.is_keras_tensor(input_tensor):
                input_tensor = keras.Input(tensor=input_tensor, shape=shape)
            found = tuple(input_tensor.shape[1:])
            if input_shape and not _agree(found, shape):
                raise ValueError(f"input_shape={shape} contradicts input_tensor, whose shape is {found}; give only one")
            shape = found

        activation = keras.activations.get(classifier_activation)
        if isinstance(weights, str) and weights == "imagenet":
            weights = "keras:imagenet" if include_top else "keras:imagenet:notop"
        taken, weights = adopt(spec, weights, variant)
        *size, channels = to_channels_last(shape, data_format)
        taken = taken.replace(in_channels=channels)
        if not include_top:
            taken = taken.with_head(head="none", pool=_POOLINGS[pooling])
        else:
            taken = taken.with_head(
                classes=classes, head="softmax" if activation is keras.activations.softmax else "logits"
            )
        if taken.input_size:
            taken = taken.replace(input_size=size)
        if isinstance(weights, Checkpoint):
            # What the arguments above say, the weights need not.
            weights = read_for(taken, weights, free=("head", "input_size"))
        options = {"input_shape": shape, "data_format": data_format, "weights": weights, "name": name}
        model = resnet_keras.from_spec(taken, input_tensor=input_tensor, **options)
        if not include_top or activation in (keras.activations.softmax, keras.activations.linear):
            return model
        ending = taken.with_head(head="softmax")
        last = layer_names(ending)[output(ending).path]
        activated = keras.Model(model.input, keras.layers.Activation(activation, name=last)(model.output), name=name)
        activated.spec = model.spec
        return activated

    height, width = spec.default_size
    build.__doc__ = _DOC.format(
        variant=variant, size=f"{height}x{width}", smallest=least_size(spec), channels=spec.in_channels
    )
    return build


def assembled(
    spec: Spec,
    network: Callable[[Any], Any],
    *,
    input_tensor: Any,
    input_shape: tuple[int | None, ...] | None,
    data_format: str,
    weights: Given | None,
    name: str,
) -> keras.Model:
    """The functional model of `spec` around `network`, which makes its output from its input; its `spec` is `spec`.

    Images are (batch, height, width, channels), or (batch, channels, height, width) with `data_format`
    "channels_first". `input_shape`, in that order and without the batch, defaults to any size, or to the spec's own
    where it has one; `input_tensor` is a Keras tensor to build upon instead. `weights` are a reference to a
    checkpoint of any known format, one that was read, or arrays by canonical name. Raises `ValueError` for an input
    that the spec does not fit, `WeightsError` for weights that are not the spec's.
    """
    if data_format not in _ORDERS:
        raise ValueError(f"data_format={data_format!r} is unknown; expected {' or '.join(map(repr, _ORDERS))}")
    if input_tensor is not None:
        images = input_tensor
        sources = keras.utils.get_source_inputs(input_tensor)
        inputs = sources[0] if len(sources) == 1 else sources
    else:
        any_image = (*(spec.input_size or (None, None)), spec.in_channels)
        images = inputs = keras.Input(input_shape or from_channels_last(any_image, data_format))
    found = tuple(images.shape)
    height, width, channels = to_channels_last(found[1:], data_format) if len(found) == 4 else (None,) * 3
    if channels != spec.in_channels:
        expected = _ORDERS[data_format].replace("channels", str(spec.in_channels))
        raise ValueError(f"the input has shape {found}; expected (batch, {expected})")
    if spec.input_size and (height, width) != spec.input_size:
        raise ValueError(f"the input has shape {found}; the flattened head takes {spec.input_size} only")
    model = keras.Model(inputs, network(images), name=name)
    model.spec = spec
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def stage_outputs(model: keras.Model, spec: Spec | None = None) -> keras.Model:
    """A model with the same layers that returns the list of the stages' outputs: C2 to C5 for four stages of a ResNet.

    `spec` is needed only for a model that was not made here but read from a file.
    """
    known = spec_of(model, spec)
    names = layer_names(known)
    outputs = [model.get_layer(names[path]).output for path in known.stage_outputs]
    return keras.Model(model.input, outputs, name=f"{model.name}_stages")


def _agree(shape: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    return len(shape) == len(other) and all(
        None in pair or len(set(pair)) == 1 for pair in zip(shape, other, strict=True)
    )


def _input_shape(
    shape: tuple[int | None, ...] | None, spec: Spec, data_format: str, *, static: bool
) -> tuple[int | None, ...]:
    """`shape` or the usual one, in the order of `data_format`."""
    if not shape:
        return from_channels_last((*(spec.default_size if static else (None, None)), spec.in_channels), data_format)
    if len(shape) != 3:
        raise ValueError(f"input_shape={shape!r} is not allowed; expected ({_ORDERS[data_format]})")
    sides, smallest = to_channels_last(shape, data_format)[:2], least_size(spec)
    if any(side is not None and side < smallest for side in sides):
        raise ValueError(f"input_shape={shape!r} is too small; expected at least {smallest}x{smallest} pixels")
    if static and None in shape:
        raise ValueError(f"input_shape={shape!r} leaves a size open; with include_top it must be static")
    return tuple(shape)
