"""Hugging Face transformers' names, `ResNetForImageClassification`, and the ``config.json`` that goes with them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.architectures import Spec
from common.checkpoints.containers import Stored
from common.errors import CheckpointError
from common.names.torchvision import StateDictNaming

NAME = "huggingface"
# What the library leaves away when it saves a model without a classifier.
BASE = "resnet."
CONFIG = "config.json"

_LAYERS = {
    "stem.conv": "resnet.embedder.embedder.convolution",
    "stem.norm": "resnet.embedder.embedder.normalization",
    "head.fc": "classifier.1",
}
_IN_BLOCK = {
    **{f"conv{i}": f"layer.{i - 1}.convolution" for i in (1, 2, 3)},
    **{f"norm{i}": f"layer.{i - 1}.normalization" for i in (1, 2, 3)},
    "shortcut.conv": "shortcut.convolution",
    "shortcut.norm": "shortcut.normalization",
}
_MOST_CONFIG = 2**20  # bytes; a thousand classes with their names take 80,000


class _HuggingFace(StateDictNaming):
    def usual(self, tensors: Mapping[str, Stored]) -> tuple[Mapping[str, Stored], tuple[str, ...]]:
        """The headless `ResNetModel` keeps its tensors without what stands before them in the model with a head."""
        if not all(name.startswith(("embedder.", "encoder.")) for name in tensors):
            return tensors, ()
        note = f"{BASE!r} was put before every name: a model without its classifier"
        return {f"{BASE}{name}": tensor for name, tensor in tensors.items()}, (note,)

    def told(self, path: Path) -> tuple[str, ...]:
        return told_by_config(path / CONFIG if path.is_dir() else path.with_name(CONFIG))

    def beside(self, path: Path, spec: Spec) -> Mapping[str, str]:
        """``model.safetensors`` gets transformers' ``config.json``."""
        config = config_for(path.with_name(CONFIG), spec) if path.name == "model.safetensors" else None
        return {} if config is None else {CONFIG: config}


NAMINGS = {
    NAME: _HuggingFace(
        name=NAME,
        title="Hugging Face transformers",
        layers=_LAYERS,
        block="resnet.encoder.stages.{stage}.layers.{block}",
        first=0,
        in_block=_IN_BLOCK,
        convolution=re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d)\.convolution\.weight"),
        first_convolution=0,
    )
}


def config_for(path: Path, spec: Spec) -> str | None:
    """The text of a ``config.json`` to be written to `path`; None where the right one is there already.

    Raises `CheckpointError` for a network that transformers has no words for, and where `path` describes another one.
    """
    config = config_of(spec)
    if not path.exists():
        return json.dumps(config, indent=2) + "\n"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    # Labels may have become names of classes since.
    fields = [name for name in config if name not in ("architectures", "id2label", "label2id")]
    if not isinstance(found, dict) or any(found.get(name) != config[name] for name in fields):
        raise CheckpointError(f"{path} is there already and describes another network; move it away")
    return None


def told_by_config(path: Path) -> tuple[str, ...]:
    """Notes on what a ``config.json`` beside the weights says and no shape shows.

    Raises `CheckpointError` for a network that none of ours is.
    """
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_MOST_CONFIG))
    except (OSError, ValueError, RecursionError):
        return ()
    if not isinstance(config, dict) or config.get("model_type") != "resnet":
        return ()
    if config.get("downsample_in_first_stage") is True or config.get("hidden_act", "relu") != "relu":
        raise CheckpointError(
            f"{path.name} beside it asks for a first stage with stride 2, or for no ReLU; no spec has that"
        )
    if config.get("downsample_in_bottleneck") is True:
        return (f"{path.name} beside it says downsample_in_bottleneck: set stride_in=conv1",)
    return ()


def config_of(spec: Spec) -> dict[str, Any]:
    """The fields of transformers' `ResNetConfig`. Raises `CheckpointError` for a network that is none of its."""
    ours: Any = spec
    bottleneck = ours.block == "bottleneck"
    classifier = ours.head != "none"
    config = {
        "architectures": ["ResNetForImageClassification" if classifier else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": ours.in_channels,
        "embedding_size": ours.stem_width,
        "hidden_sizes": [width * ours.expansion for width in ours.widths],
        "depths": list(ours.blocks),
        "layer_type": ours.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": bottleneck and ours.stride_in == "conv1",
    }
    if classifier:
        labels = {index: f"LABEL_{index}" for index in range(ours.classes)}
        config |= {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    theirs = type(ours)(
        block=ours.block,
        blocks=ours.blocks,
        widths=ours.widths,
        in_channels=ours.in_channels,
        classes=ours.classes,
        stem_width=ours.stem_width,
        stride_in=ours.stride_in if bottleneck else None,
        bn_momentum=ours.bn_momentum,  # of training alone
        running_variance=ours.running_variance,
        head="logits" if classifier else "none",
        head_pool="none" if ours.head_pool == "none" else "average",
    )
    if ours != theirs:
        fields = [name for name, value in vars(theirs).items() if getattr(ours, name, None) != value]
        raise CheckpointError(
            f"transformers has no config for a network with {', '.join(f'{f}={getattr(ours, f)!r}' for f in fields)}; "
            "write a file of another name than model.safetensors, which gets none"
        )
    return config
