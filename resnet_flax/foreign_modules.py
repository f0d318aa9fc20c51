"""What modules of linen and of nnx have in common: how they are called, and where their dtypes stand."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import ModelError

# Parameters of a call, and fields of a module, that say whether it trains; of the others, whether it does not.
TRAINING = frozenset({"train", "training", "is_training", "is_train"})
INFERENCE = frozenset({"deterministic", "eval", "inference", "use_running_average"})


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those of a method, without its module."""
    return list(inspect.signature(function).parameters.values())[1:]


def is_switch(name: str) -> bool:
    """Whether a parameter or field of that name says if the model trains."""
    return name in TRAINING | INFERENCE


def switched(name: str, training: bool) -> bool:
    """The value of a switch."""
    return training if name in TRAINING else not training


def arguments(
    title: str,
    signature: list[inspect.Parameter],
    inputs: Mapping[str, Any],
    *,
    named: bool,
    training: bool,
    switches: bool = True,
) -> tuple[list[Any], dict[str, Any]]:
    """What to call a module with: `inputs` in order, or, where they are `named`, by keyword; as one dict where the
    module has no parameters of these names.

    Raises `ModelError` for a parameter that nothing is given for, and for more arrays than the module takes.
    """
    kinds = inspect.Parameter
    places = [one for one in signature if one.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    arrays = [one for one in places if not (switches and is_switch(one.name))]
    any_number = any(one.kind == kinds.VAR_POSITIONAL for one in signature)
    any_name = any(one.kind == kinds.VAR_KEYWORD for one in signature)

    rest: list[Any] = []
    if named:
        by_keyword = {one.name for one in arrays if one.kind != kinds.POSITIONAL_ONLY}
        needed = {one.name for one in arrays if one.default is kinds.empty}
        if inputs.keys() <= by_keyword or (any_name and needed <= inputs.keys()):
            values = dict(inputs)
        else:
            values, rest = {}, [dict(inputs)]
    else:
        values, rest = {}, list(inputs.values())
    if rest:
        free = [one.name for one in arrays if one.kind != kinds.KEYWORD_ONLY or one.default is kinds.empty]
        values = dict(zip(free, rest, strict=False))
        rest = rest[len(free) :]
        if rest and not any_number:
            raise ModelError(f"`{title}` takes {len(free)} inputs, {len(inputs)} were given")
    for one in arrays:
        if one.default is kinds.empty and one.name not in values:
            raise ModelError(f"`{title}` needs `{one.name}` beside its inputs; give a dict of inputs by name")
    if switches:
        values |= {one.name: switched(one.name, training) for one in places if is_switch(one.name)}

    positional: list[Any] = []
    for one in places:
        # As people write it: in order as long as nothing is left out, and switches by name.
        only = one.kind == kinds.POSITIONAL_ONLY
        if one.kind == kinds.KEYWORD_ONLY or one.name not in values or (is_switch(one.name) and not (rest or only)):
            break
        positional.append(values.pop(one.name))
    return [*positional, *rest], values


def drops(kind: str) -> bool:
    """Whether a class, by its name, leaves out values at random in training."""
    return re.match(r"Drop(out|path|block|connect|$)|Spatial_?drop|StochasticDepth|DropPath", kind, re.I) is not None


def in_dtype(name: str, value: Any, dtype: str, modules: Callable[[Any], Any] | None = None) -> Any:
    """`value` of a field or attribute, with the dtypes in it such as `dtype` asks: those of fields that are called so,
    also in a partial, a configuration or a container. The same object where nothing changes.

    `modules` is what to do with modules among them.
    """
    if modules is not None and (new := modules(value)) is not None:
        return new
    if name.endswith("dtype") or name == "preferred_element_type":
        return _dtype(value, dtype)

    def changed(items: Mapping[str, Any]) -> dict[str, Any]:
        new = {key: in_dtype(key, item, dtype, modules) for key, item in items.items()}
        return {key: item for key, item in new.items() if item is not items[key]}

    if isinstance(value, partial):
        new = changed(value.keywords)
        return partial(value.func, *value.args, **{**value.keywords, **new}) if new else value
    if isinstance(value, list | tuple):
        items = [in_dtype(name, item, dtype, modules) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        new = changed(value)
        return type(value)({**value, **new}) if new else value  # type: ignore[call-arg]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.init}
        new = changed(fields)
        return dataclasses.replace(value, **new) if new else value
    return value


def _dtype(value: Any, dtype: str) -> Any:
    """A floating-point dtype as `cast` has it, written as it was; anything else as it is."""
    if value is None:
        return value
    try:
        old = jnp.dtype(value)
    except TypeError:
        return value
    if cast(old, dtype) == old:
        return value
    if isinstance(value, str):
        return dtype
    return np.dtype(dtype) if isinstance(value, np.dtype) else getattr(jnp, dtype)


def cast(old: Any, dtype: str) -> Any:
    """The dtype that arrays of dtype `old` have in a model in `dtype`: float64 casts all that is floating point. A
    model in float32 keeps what is shorter."""
    if not jnp.issubdtype(old, jnp.floating):
        return old
    return np.dtype(dtype) if dtype == "float64" or old == np.float64 else old


def named_leaves(tree: Any, *, boxed: bool = False) -> list[tuple[tuple[str, ...], Any]]:
    """Leaves of a tree with their paths; without the boxes, where arrays may be `boxed`, as partitioned ones are."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = []
    for keys, leaf in leaves:
        inside = boxed and keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value"
        named.append((tuple(_key(key) for key in (keys[:-1] if inside else keys)), leaf))
    return named


def _key(key: Any) -> str:
    words = (getattr(key, word) for word in ("key", "name", "idx") if hasattr(key, word))
    return str(next(words, key))
