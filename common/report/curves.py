"""The curves of several runs over each other, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import TrainingError, framework
from common.files import written
from common.training import metrics, run

_FORMATS = ("png", "svg", "pdf")


def draw(folders: Sequence[Path], output: Path) -> None:
    """Loss of every step (the mean of its epoch where steps are many), and accuracy of every epoch on the images that
    were held out, or else on the test images.

    Raises `TrainingError` for a folder that is no run, has no metrics yet, or a kind of picture that is unknown.
    """
    with framework({"matplotlib": ("Matplotlib", "training")}):
        import matplotlib.figure
    kind = output.suffix.lstrip(".").lower()
    if kind not in _FORMATS:
        raise TrainingError(f"{output}: expected a name that ends in {', '.join('.' + one for one in _FORMATS)}")
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for folder in folders:
        facts, lines = run.facts(folder), metrics.read(folder)
        if not lines:
            raise TrainingError(f"{folder}: has no metrics yet; train it first")
        label = f"{folder.name}: {facts['variant']} {facts['backend']}"
        by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "validation", "test")}
        train, evaluated = by_kind["train"], by_kind["validation"] or by_kind["test"]
        losses.plot(*_smoothed([line["epoch"] for line in train], [line["loss"] for line in train]), label=label)
        accuracies.plot(
            [line["epoch"] for line in evaluated],
            [100 * line["accuracy"] for line in evaluated],
            marker=".",
            label=label,
        )
    losses.set(title="training loss", xlabel="epoch", yscale="log")
    accuracies.set(title="accuracy on images not trained on, %", xlabel="epoch")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
    accuracies.legend(loc="lower right", fontsize="small")
    with written(output, TrainingError) as beside:
        figure.savefig(beside, format=kind, dpi=150)


def _smoothed(epochs: list[float], losses: list[float]) -> tuple[list[float], list[float]]:
    """Means over windows, of at most some 400 points."""
    size = max(1, len(losses) // 400)
    windows: Any = range(0, len(losses) - size + 1, size)
    return [epochs[i + size - 1] for i in windows], [sum(losses[i : i + size]) / size for i in windows]
