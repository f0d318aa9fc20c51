"""The order in which Keras has the layers of a functional model, and in which its files have their arrays."""

from collections.abc import Sequence

from common.architectures.layers import INPUT, Layer


def model_order(layers: Sequence[Layer], shortcut_first: bool) -> list[Layer]:
    """The layers of a walk as in `model.layers`.

    Keras sorts by the distance from the output, and layers at one distance by when it meets them on its way back from
    the output: so a projection stands beside the last layers of its block, before or after them as the addition reads
    it first or last.
    """
    by_path = {layer.path: layer for layer in layers}
    distance = dict.fromkeys(by_path, 0)
    for layer in reversed(layers):
        for path in layer.inputs:
            if path != INPUT:
                distance[path] = max(distance[path], distance[layer.path] + 1)
    met: dict[str, int] = {}
    # The network's own output, the last in the walk, is a model's first; then come auxiliary ones, the last first.
    todo = [path for path, steps in distance.items() if steps == 0]
    while todo:
        path = todo.pop()
        if path == INPUT or path in met:
            continue
        met[path] = len(met)
        # The last one pushed is the first to be followed.
        inputs = by_path[path].inputs
        todo += inputs if shortcut_first else inputs[::-1]
    return sorted(layers, key=lambda layer: (-distance[layer.path], met[layer.path]))
