"""Tables a person can read in ten seconds."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.backends.process import BackendProcess
from common.parity.compare import Comparison, Difference
from common.parity.levels import ORDER_LIMIT, PRECISION_FACTOR, RESPONSE_FACTOR
from common.parity.session import CheckResult
from common.report.explained import Line, explained
from common.training import recipe as recipes
from common.training.recipe import TrainingRecipe

_TITLES = {
    "L0": "L0 exact: names and layouts, integer arithmetic",
    "L1": "L1 identity in float64",
    "L2": "L2 precision in float32",
}
_STYLES = {"same": "green", "different": "bold red", "undecided": "yellow", "reported": "dim"}
_MOST = 6


def result(found: CheckResult) -> Group:
    """The outcome of a check: what was run, a table for each level, and the verdict."""
    recipe = found.facts["recipe"]
    parts: list[RenderableType] = [Text(""), Text.assemble((found.variant, "bold"), f"  {found.title}")]
    if recipe is not None:
        parts.append(Text(f"  {recipe['steps']} steps of {_in_words(recipe)}", style="dim"))
    parts += [comparison(compared) for compared in found.comparisons]
    for pair in found.pairs:
        parts += explained(pair)
    parts += [Text(f"  {error}", style="bold red") for error in found.failures.values()]
    verdict = (
        Text("SAME FUNCTION", style="bold green") if found.passed else Text("NOT SHOWN TO BE THE SAME", "bold red")
    )
    parts.append(Text.assemble("  ", verdict, f"  {found.variant}, {found.seconds:.1f} s"))
    return Group(*parts)


def comparison(compared: Comparison, named: bool = True) -> Group:
    """One level: the worst of every mode and pair, and on failure where it begins and whose it is. Where there is one
    pair alone its models need not be `named` in every row."""
    parts: list[RenderableType] = [Text(f"  {_TITLES[compared.level]}", style="bold")]
    if compared.level == "L0":
        parts.append(Line(_exact(compared)))
    else:
        parts.append(Padding(_table(compared, named), (0, 0, 0, 4), expand=False))
    parts += [Line(line) for line in _explain(compared)]
    return Group(*parts)


def _exact(compared: Comparison) -> Text:
    arrays = len({d.tensor for d in compared.differences})
    equal = sum(d.verdict == "same" for d in compared.differences)
    style = "green" if compared.passed else "bold red"
    pairs = len({d.pair for d in compared.differences})
    return Text(
        f"{equal} of {len(compared.differences)} bit-equal ({arrays} arrays, {pairs} pairs); "
        f"weights bitwise after load and export: {'yes' if not compared.problems else 'see below'}",
        style=style,
    )


def _table(compared: Comparison, named: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("mode", no_wrap=True)
    if named:
        table.add_column("pair", overflow="fold")
    table.add_column("rel. error", justify="right", no_wrap=True)
    table.add_column("/ response", justify="right", no_wrap=True)
    table.add_column("largest at", overflow="fold")
    for part, differences in _by_section(compared.worst()).items():
        for index, difference in enumerate(differences):
            style = _STYLES[difference.verdict]
            note = "" if difference.verdict in ("same", "different") else f"  ({difference.verdict})"
            table.add_row(
                part if index == 0 else "",
                *([" | ".join(difference.pair)] if named else []),
                Text(f"{difference.error:.1e}", style),
                Text(f"{difference.ratio:.2f}" if difference.ratio < 1000 else f"{difference.ratio:.1e}", style),
                Text(difference.tensor.where + note, style),
            )
    return table


def _by_section(differences: Iterable[Difference]) -> dict[str, list[Difference]]:
    sections: dict[str, list[Difference]] = {}
    for difference in differences:
        sections.setdefault(difference.tensor.section, []).append(difference)
    return sections


def _in_words(recipe: Mapping[str, Any]) -> str:
    """What decides the steps and is not as it is without a word."""
    usual, unseen = recipes.to_dict(TrainingRecipe()), ("steps", "batch_size", "epochs", "seed", "augmentation")
    words = [
        f"{name} {value}"
        for name, value in recipe.items()
        if name not in (*unseen, "optimizer") and usual.get(name) != value
    ]
    return ", ".join([recipe["optimizer"], *words])


def _explain(compared: Comparison) -> Iterable[Text]:
    """What a reader must know beyond the table, a line each."""
    for column, layers in compared.float32_inside.items():
        if layers:
            yield Text(
                f"{column} rounds to float32 inside this float64 network (held to L2 here), at {len(layers)} layers: "
                f"{', '.join(layers)}",
                style="yellow",
            )
    for problem in compared.problems[:_MOST]:
        yield Text(f"{problem.backend}: {problem.tensor} {problem.what}", style="bold red")
    if len(compared.problems) > _MOST:
        yield Text(f"… and {len(compared.problems) - _MOST} more problems of this kind", style="bold red")
    for found in compared.order_dependent:
        yield Text(
            f"{found.backend} depends on the order of the batch: first at {found.tensor.where} "
            f"({found.tensor.section}), relative change {found.error:.1e}, {found.ratio:.3g} one-ulp responses; the "
            f"limit is {ORDER_LIMIT if found.response else 0:g}",
            style="bold red",
        )
    if (first := compared.first) is not None:
        yield Text(
            f"first difference: {first.tensor.where} ({first.tensor.section}), {' | '.join(first.pair)}: relative "
            f"error {first.error:.1e}, {first.ratio:.3g} responses; the limit is {RESPONSE_FACTOR:g}",
            style="bold red",
        )
    undecided = {d.tensor: d for d in compared.differences if d.verdict == "undecided"}
    unordered = {d.tensor: d for d in undecided.values() if not d.ordered and d.distance > RESPONSE_FACTOR * d.response}
    if unordered:
        example = next(iter(unordered.values()))
        yield Text(
            f"undecided: {len(unordered)} arrays, {example.tensor.where} ({example.tensor.section}) first: "
            "a single image has no other order to measure what sums may do; use a batch of 2"
            + _option(compared, "--batch 2"),
            style="yellow",
        )
    elif undecided:
        example = next(iter(undecided.values()))
        yield Text(
            f"undecided: {len(undecided)} arrays, {example.tensor.where} ({example.tensor.section}) first: "
            "rounding alone moves them too much to tell anything; use more images"
            + _option(compared, "--batch")
            + " or larger ones"
            + _option(compared, "--size")
            + (", a lower rate (--set lr=…) or fewer --steps" if example.tensor.step else ""),
            style="yellow",
        )
    imprecise = [p for p in compared.precision if not p.passed]
    if imprecise:
        worst = imprecise[0]
        of_what = "median" if worst.median >= worst.response else "response"
        yield Text(
            f"imprecise: {worst.backend} at {worst.tensor.place} (eval): its own float32 error is "
            f"{worst.error:.1e}, {worst.ratio:.3g} times the {of_what}; the limit is {PRECISION_FACTOR:g}",
            style="bold red",
        )
    elif compared.precision:
        last = compared.precision[-len(compared.backends) :]
        yield Text("own rounding error of the output: " + ", ".join(f"{p.backend} {p.error:.1e}" for p in last), "dim")
    if not compared.passed and (odd := compared.odd_one_out):
        yield Text(f"the odd one out: {odd}", style="bold red")


def _option(compared: Comparison, option: str) -> str:
    """How a check is told so; a user's own model has inputs of its own."""
    return "" if "model" in compared.subject else f" ({option})"


def timings(processes: Mapping[str, BackendProcess], own: Mapping[str, float]) -> Table:
    """Where the time went, by backend, with the largest memory of each process."""
    what = [key for key in dict.fromkeys(k for p in processes.values() for k in p.seconds) if key != "in all"]
    table = Table(box=None, pad_edge=False, header_style="dim", title="seconds", title_justify="left")
    table.add_column("backend")
    for column in (*what, "in all", "peak memory"):
        table.add_column(column, justify="right")
    for name, process in processes.items():
        seconds = [f"{process.seconds.get(key, 0.0):.1f}" for key in (*what, "in all")]
        table.add_row(name, *seconds, f"{process.peak_bytes / 2**30:.2f} GiB")
    table.caption = "this process: " + ", ".join(f"{key} {value:.1f}" for key, value in own.items())
    table.caption_justify = "left"
    return table
