"""Networks as tables: the named variants, and the layers of one."""

from collections.abc import Mapping
from math import prod

from rich.table import Table

from common.architectures import Spec, running
from common.architectures.layers import INPUT, Conv, Dense, DepthwiseConv, Layer, Window, output_shapes
from common.architectures.layers import multiply_adds as multiply_adds_of


def variants(specs: Mapping[str, Spec]) -> Table:
    """Named variants with their depth, their size, and their cost for the images that they are usually fed."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("variant")
    for column in ("layers", "parameters", "statistics", "input", "multiply-adds"):
        table.add_column(column, justify="right")
    for name, spec in specs.items():
        size = spec.default_size
        used = running(spec, training=False)
        costs = multiply_adds_of(used, output_shapes(used, (*size, spec.in_channels)))
        millions = sum(costs.values()) / 1e6
        table.add_row(
            name,
            str(_depth(spec)),
            f"{sum(layer.parameter_count for layer in spec.layers):,}",
            f"{sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values()):,}",
            f"{size[0]}x{size[1]}",
            f"{millions:,.{0 if millions >= 10 else 1}f} M",
        )
    return table


def _depth(spec: Spec) -> int:
    """The most convolutions and dense layers that an image passes through: the number in the names of networks."""
    depths = {INPUT: 0}
    for layer in running(spec, training=False):
        depths[layer.path] = max(depths[path] for path in layer.inputs) + isinstance(layer, Conv | Dense)
    return max(depths.values())


def layers(spec: Spec, size: tuple[int, int]) -> Table:
    """The layer walk at an image size: shapes, parameters, multiply-adds; their total is that of eval mode."""
    shapes = output_shapes(spec.layers, (*size, spec.in_channels))
    costs = multiply_adds_of(spec.layers, shapes)
    total = sum(costs[layer.path] for layer in running(spec, training=False))
    table = Table(box=None, pad_edge=False, header_style="dim", show_footer=True)
    table.add_column("layer", "total")
    table.add_column("kind")
    table.add_column("window")
    table.add_column("output", "", justify="right")
    table.add_column("parameters", f"{sum(layer.parameter_count for layer in spec.layers):,}", justify="right")
    table.add_column("multiply-adds", f"{total:,}", justify="right")
    table.add_row(INPUT, "", "", "x".join(map(str, shapes[INPUT])), "", "")
    for layer in spec.layers:
        table.add_row(
            layer.path,
            f"{layer.kind} (training)" if layer.training_only else layer.kind,
            _window(layer),
            "x".join(map(str, shapes[layer.path])),
            f"{layer.parameter_count:,}" if layer.parameter_count else "",
            f"{costs[layer.path]:,}" if costs[layer.path] else "",
        )
    return table


def _window(layer: Layer) -> str:
    """Kernel, stride and what else is not the usual, in short."""
    if not isinstance(layer, Window):
        return ""
    height, width = layer.sides
    parts = [f"{height}x{width}"]
    for name, usual in (("stride", 1), ("dilation", 1), ("groups", 1)):
        value = getattr(layer, name, usual)
        if value != usual and not (name == "groups" and isinstance(layer, DepthwiseConv)):  # its kind says it
            parts.append(f"{name} {value}")
    if max(layer.sides) > 1 and layer.padding != "symmetric":
        parts.append(f"padding {layer.padding}" if isinstance(layer.padding, int) else layer.padding)
    return ", ".join(parts)
