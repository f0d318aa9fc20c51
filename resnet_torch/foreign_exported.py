"""Exported programs: graphs of operators, each of which is a layer to a comparison."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from common.foreign.protocol import Call
from resnet_torch.foreign_operations import arrays_of_operator
from resnet_torch.foreign_watch import Watch, floats, replaced, tensors_in


def is_exported(model: nn.Module) -> bool:
    """Whether it is the module of an exported program, rather than one that calls layers."""
    return isinstance(model, torch.fx.GraphModule) and any(map(is_operator, model.graph.nodes))


def is_operator(node: torch.fx.Node) -> bool:
    """Whether it is an ATen operator."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def title_of(program: torch.export.ExportedProgram) -> str:
    """The class of the model that it was made of."""
    for node in program.graph.nodes:
        for _, cls in (node.meta.get("nn_module_stack") or {}).values():
            return str(getattr(cls, "__name__", cls)).rpartition(".")[2]
    return type(program).__name__


class Operators(torch.fx.Interpreter):
    """Runs the module of an exported program, with every operator that computes floating-point numbers as a layer."""

    def __init__(self, module: torch.fx.GraphModule, watch: Watch) -> None:
        super().__init__(module)
        self._watch = watch
        self._names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}

    def run_node(self, node: torch.fx.Node) -> Any:
        if not is_operator(node):
            return super().run_node(node)
        schema: Any = node.target._schema  # type: ignore[union-attr]
        kind = schema.name.partition("::")[2].removesuffix("_")  # "relu" of "aten::relu_" too
        read: list[torch.fx.Node] = []
        map_arg((node.args, node.kwargs), read.append)
        sources = [one for one in read if one.op != "get_attr" and isinstance(self.env[one], Tensor)]
        given = iter(self._watch.enter(node.name, kind, [self.env[one] for one in sources]))
        args, kwargs = map_arg((node.args, node.kwargs), lambda one: next(given) if one in sources else self.env[one])
        result = self.call_function(node.target, args, kwargs)
        leaves, structure = tree_flatten(result)
        tensors = tensors_in(leaves)
        entered = self._watch.inside[-1]
        if any(map(floats, tensors)):
            words = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
            arrays = arrays_of_operator(kind, self._arrays({**words, **node.kwargs}))
            call = Call(name=entered.name, layer=_module_of(node), kind=kind, arrays=arrays)
            # A view has to stay one, and what was changed in place the same.
            aliases = any(one.alias_info is not None for one in schema.returns)
            changed = replaced(leaves, structure, tensors, self._watch.leave(entered, call, tensors, aliases=aliases))
            result = result if changed is None else changed
        self._watch.inside.pop()
        return result

    def _arrays(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
        """What the model holds among the arguments of an operator."""
        for word, one in given.items():
            if isinstance(one, torch.fx.Node) and one.op == "get_attr" and one.target in self._names:
                yield word, str(one.target), self.env[one]


def _module_of(node: torch.fx.Node) -> str:
    """The path of the module that an operator was in; the operator's own name where that is the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (str(stack[-1][0]) if stack else "") or node.name
