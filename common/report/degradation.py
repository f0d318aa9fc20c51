"""What the degradation experiment found: a table, the same as data, and its two figures."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from rich.table import Table

from common.errors import TrainingError, framework
from common.files import written
from common.training.degradation import KINDS, Found

ERRORS = "errors.png"
GRADIENTS = "gradients.png"
TABLE = "table.json"
_FORMAT = "resnet-parity degradation 1"
_COLOURS = ("tab:blue", "tab:red")  # of the shallow and the deep network of a kind


def by_network(found: Iterable[Found]) -> dict[str, list[Found]]:
    """What the runs of each network found."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.training.plan.variant, []).append(one)
    return groups


def table(found: Iterable[Found]) -> Table:
    """For people: errors at the end by network, the mean over the seeds and their range, and norms of gradients.

    Both norms are of the first convolution's kernel over the last one's: the layers that are farthest from the loss and
    nearest to it. The dense layer after the last is left out, which has no norm behind it.
    """
    made = Table(box=None, pad_edge=False, header_style="dim")
    made.add_column("network", no_wrap=True)
    for column in (
        "layers",
        "train error %",
        "of seeds",
        "test error %",
        "of seeds",
        "gradient first/last, start",
        "end",
    ):
        made.add_column(column, justify="right", no_wrap=True)
    for name, runs in by_network(found).items():
        row = [name, str(len(runs[0].start))]
        for errors in ([run.train[-1] for run in runs], [run.test[-1] for run in runs]):
            row += [f"{100 * fmean(errors):.2f}", f"{100 * min(errors):.2f} … {100 * max(errors):.2f}"]
        row += [_ratio([list(getattr(run, when).values()) for run in runs]) for when in ("start", "end")]
        made.add_row(*row)
    return made


def verdicts(found: Iterable[Found]) -> list[str]:
    """A line for each kind of network: how much worse on its training set the deeper one is, seed by seed."""
    lines = []
    for kind, (shallow, deep) in KINDS.items():
        points = _differences(by_network(found), shallow, deep)
        listed = ", ".join(f"{100 * value:+.2f}" for value in points)
        lines.append(
            f"{kind}: {deep} has {100 * fmean(points):+.2f} points of training error over {shallow} ({listed})"
        )
    return lines


def to_dict(found: Iterable[Found], facts: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON data; errors are shares."""
    groups = by_network(found)
    return {
        "format": _FORMAT,
        **facts,
        "deeper_minus_shallower": {
            kind: {"networks": [shallow, deep], "train_error": _differences(groups, shallow, deep)}
            for kind, (shallow, deep) in KINDS.items()
        },
        "runs": [
            {
                "network": one.training.plan.variant,
                "seed": one.training.seed,
                "train_error": list(one.train),
                "test_error": list(one.test),
                "gradient_norms": {"start": dict(one.start), "end": dict(one.end)},
            }
            for one in found
        ],
    }


def write(folder: Path, found: Sequence[Found], facts: Mapping[str, Any]) -> list[Path]:
    """The figures and the table, in `folder`; each whole or not at all. Raises `TrainingError`."""
    seeds = sorted({one.training.seed for one in found})
    averaged = f"mean and range of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    title = f"{facts['data']}, {facts['backend']}, {averaged}"
    paths = [folder / name for name in (ERRORS, GRADIENTS, TABLE)]
    _draw(paths[0], lambda figure: _errors(figure, found), title)
    _draw(paths[1], lambda figure: _gradients(figure, found), title)
    with written(paths[2], TrainingError) as beside:
        beside.write_text(json.dumps(to_dict(found, facts), indent=1) + "\n", encoding="utf-8")
    return paths


def _draw(path: Path, content: Callable[[Any], None], title: str) -> None:
    with framework({"matplotlib": ("Matplotlib", "training")}):
        import matplotlib.figure
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    content(figure)
    figure.suptitle(title, fontsize="medium")
    with written(path, TrainingError) as beside:
        figure.savefig(beside, format="png", dpi=150)


def _errors(figure: Any, found: Iterable[Found]) -> None:
    """As figure 6 of the paper: plain networks left, residual ones right; dashed of training, solid of test images."""
    groups = by_network(found)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (kind, pair) in zip(panels, KINDS.items(), strict=True):
        for name, colour in zip(pair, _COLOURS, strict=True):
            for part, style in (("train", "--"), ("test", "-")):
                curves = [getattr(run, part) for run in groups[name]]
                epochs = range(1, min(map(len, curves)) + 1)
                values = [[100 * curve[n - 1] for curve in curves] for n in epochs]
                axes.plot(epochs, [fmean(v) for v in values], style, color=colour, label=f"{name} {part}", marker=".")
                axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
        axes.set(title=kind, xlabel="epoch")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0].set(ylabel="error, %")


def _gradients(figure: Any, found: Iterable[Found]) -> None:
    groups = by_network(found)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, when in zip(panels, ("start", "end"), strict=True):
        for (shallow, deep), style in zip(KINDS.values(), ("--", "-"), strict=True):
            for name, colour in zip((shallow, deep), _COLOURS, strict=True):
                norms = [list(getattr(run, when).values()) for run in groups[name]]
                depths = range(1, len(norms[0]) + 1)
                values = [[run[n - 1] for run in norms] for n in depths]
                axes.plot(depths, [_middle(v) for v in values], style, color=colour, label=name)
                axes.fill_between(depths, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
        axes.set(title=f"at the {when} of the training", xlabel="layer with a kernel, from the image on", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    panels[0].set(ylabel="norm of the kernel's gradient")


def _middle(values: Sequence[float]) -> float:
    """The geometric mean, as a logarithmic axis wants it; 0 where a gradient has vanished altogether."""
    return geometric_mean(values) if all(value > 0 for value in values) else 0.0


def _ratio(runs: Sequence[Sequence[float]]) -> str:
    """The norm of the first convolution's gradient over that of the last one's; runs have the norms by layer."""
    first, last = (_middle([norms[place] for norms in runs]) for place in (0, -2))
    return f"{first / last:.3g}" if first and last else "none"


def _differences(groups: Mapping[str, list[Found]], shallow: str, deep: str) -> list[float]:
    """The deep network's training error after the last epoch less the shallow one's, by seed."""
    return [d.train[-1] - s.train[-1] for s, d in zip(groups[shallow], groups[deep], strict=True)]
