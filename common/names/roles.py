"""What each community calls the arrays of a layer, and how it lays them out; the same for every family of networks.

``{}`` stands for the name of the layer.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from common.weights.layouts import Layout

# fmt: off
_ARRAYS = {
    # kind, role          canonical     PyTorch              Keras                 Flax
    ("conv", "kernel"):      ("{}.kernel", "{}.weight",       "{}/kernel",          "params/{}/kernel"),
    ("conv", "bias"):        ("{}.bias",   "{}.bias",         "{}/bias",            "params/{}/bias"),
    ("depthwise", "kernel"): ("{}.kernel", "{}.weight",       "{}/kernel",          "params/{}/kernel"),
    ("depthwise", "bias"):   ("{}.bias",   "{}.bias",         "{}/bias",            "params/{}/bias"),
    ("norm", "scale"):       ("{}.scale",  "{}.weight",       "{}/gamma",           "params/{}/scale"),
    ("norm", "bias"):        ("{}.bias",   "{}.bias",         "{}/beta",            "params/{}/bias"),
    ("norm", "mean"):        ("{}.mean",   "{}.running_mean", "{}/moving_mean",     "batch_stats/{}/mean"),
    ("norm", "var"):         ("{}.var",    "{}.running_var",  "{}/moving_variance", "batch_stats/{}/var"),
    ("dense", "kernel"):     ("{}.kernel", "{}.weight",       "{}/kernel",          "params/{}/kernel"),
    ("dense", "bias"):       ("{}.bias",   "{}.bias",         "{}/bias",            "params/{}/bias"),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Roles:
    """One community's arrays: kind of layer -> role -> name, with the name of the layer left open."""

    arrays: Mapping[str, Mapping[str, str]]
    layout: Layout
    ignored: re.Pattern[str]  # arrays that are known to belong to no layer: counters, the state of training
    counters: Mapping[str, str] = field(default_factory=dict)  # kind -> a zero that strict loaders ask for
    metadata: Mapping[str, str] = field(default_factory=dict)  # what loaders look for, in a file that can hold it
    older: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # kind -> role -> a name that old files have

    def array(self, layer: str, kind: str, role: str) -> str:
        """Name of an array of a layer."""
        return self.arrays[kind][role].replace("{}", layer)

    def layers_of(self, array: str) -> Iterator[tuple[str, str]]:
        """(name of the layer, form of the array's name) of whatever layer an array of this name could belong to."""
        kinds = (*self.arrays.values(), *self.older.values())
        for form in dict.fromkeys(form for forms in kinds for form in forms.values()):
            before, _, after = form.partition("{}")
            if array.startswith(before) and array.endswith(after) and len(array) > len(form) - 2:
                yield array[len(before) : len(array) - len(after)], form

    def role(self, kind: str, form: str) -> str | None:
        """The role that an array of this form has in a layer of this kind."""
        known = (*self.arrays[kind].items(), *self.older.get(kind, {}).items())
        return next((role for role, own in known if own == form), None)


def _column(index: int) -> dict[str, dict[str, str]]:
    arrays: dict[str, dict[str, str]] = {}
    for (kind, role), row in _ARRAYS.items():
        arrays.setdefault(kind, {})[role] = row[index]
    return arrays


CANONICAL = Roles(arrays=_column(0), layout="HWIO", ignored=re.compile(r"(?!)"))
PYTORCH = Roles(
    arrays=_column(1),
    layout="OIHW",
    ignored=re.compile(r".*\.num_batches_tracked"),
    counters={"norm": "{}.num_batches_tracked"},
    metadata={"format": "pt"},  # transformers loads only files that state a framework
)
KERAS = Roles(
    arrays=_column(2),
    layout="HWCM",
    older={"depthwise": {"kernel": "{}/depthwise_kernel"}},  # Keras 2
    # What a Keras file holds beside layers: the state of training, and generators of random numbers in augmentation.
    ignored=re.compile(
        r"(optimizer|optimizer_weights|metrics|compile_metrics|loss_tracker)/.*|(.*/)?seed_generator(_\d+)?/.*"
    ),
)
FLAX = Roles(
    arrays=_column(3),
    layout="HWIO",
    # What else a train state holds.
    ignored=re.compile(r"(opt_state|step|epoch|dynamic_scale|rngs?|dropout_rng|key|config|metrics|ema(_[^/]*)?)(/.*)?"),
)
