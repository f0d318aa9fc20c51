"""Where two models part and why, as a person reads it."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.diagnosis.causes import title
from common.diagnosis.evidence import Diagnosis, Explained
from common.parity.localise import Added, Localised
from common.parity.models import Pair

_MOST = 8
# Of a place: in the table, and before its name.
_WORDS = {
    "input": ("its input", "the input of"),
    "layer": ("its output", "the output of"),
    "result": ("what the model returns", "what the model returns:"),
    "statistic": ("a statistic", "the statistic"),
    "gradient": ("a gradient", "the gradient of"),
    "cotangent": ("what comes back", "what comes back to"),
}


class Line:
    """A line of text, indented; whole where a log wraps by itself, and in a terminal each of its rows is."""

    def __init__(self, content: Text, indent: int = 4) -> None:
        self._content, self._indent = content, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Padding cuts what it may not wrap.
        if options.no_wrap:
            yield Text(" " * self._indent).append_text(self._content)
        else:
            yield Padding(self._content, (0, 0, 0, self._indent), expand=False)


def explained(pair: Pair) -> list[RenderableType]:
    """What is known of a pair that differs."""
    parts: list[RenderableType] = []
    if pair.localised is not None:
        parts.append(localised(pair.localised))
    if pair.diagnosis is not None:
        parts.append(diagnosis(pair.diagnosis))
    return parts


def localised(found: Localised) -> Group:
    """Each place that adds an error of its own, and where that begins, forwards and backwards."""
    how = (
        "each layer alone, on the reference's own input"
        if found.measured
        else "from records: the first place that differs"
    )
    parts: list[RenderableType] = [Text(f"  L3 {how}", "bold")]
    failing = found.failing
    if not failing:
        parts.append(
            Text(
                "    no layer adds more than rounding of its own: what differs lies outside of them, as a loss does",
                "yellow",
            )
        )
        return Group(*parts)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("layer", "in yours", "of", "mode"):
        table.add_column(column, overflow="fold", no_wrap=column in ("of", "mode"))
    for column in ("added", "inherited", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    forward = [one for one in failing if not one.backward]
    shown = (forward or list(failing))[:_MOST]
    for one in shown:
        inherited = "" if one.inherited is None else f"{one.inherited:.1e}"
        table.add_row(
            one.place,
            one.yours,
            _WORDS[one.part][0],
            one.run,
            Text(f"{one.added:.1e}", "bold red"),
            inherited,
            f"{one.limit:.0e}",
        )
    parts.append(Padding(table, (0, 0, 0, 4), expand=False))
    if len(failing) > len(shown):
        back = sum(one.backward for one in failing) if forward else 0
        rest = len(failing) - len(shown)
        of_these = f", {back if back < rest else 'all'} of them on the way back" if back else ""
        parts.append(Text(f"    … and {rest} more{of_these}", "dim"))
    for words, first in (("forwards", found.first), ("backwards", found.first_backward)):
        if first is not None:
            parts.append(Line(Text(f"first {words}: {_where(first)}, added {first.added:.1e}", "bold red")))
    return Group(*parts)


def diagnosis(found: Diagnosis) -> Group:
    """Each defect in a sentence with its proof, and what comes next."""
    parts: list[RenderableType] = [Text("  diagnosis", "bold")]
    for number, defect in enumerate(found.defects, 1):
        parts += [Line(line) for line in _defect(number, defect)]
    if found.as_spec is not None:
        spec = found.as_spec
        parts.append(
            Line(
                Text(
                    f"as a specification: yours {spec.yours}, and the reference {spec.reference}; "
                    f"so changed it agrees to {spec.after:.0e} ({spec.before:.2g} now)",
                    "bold red",
                )
            )
        )
    if not found.defects:
        parts.append(Text("    no hypothesis was tried: nothing adds more than rounding", "yellow"))
    return Group(*parts)


def _defect(number: int, defect: Explained) -> Iterator[Text]:
    if defect.best is None:
        yield Text(f"{number}. no hypothesis explains it; the first unexplained place is `{defect.place}`", "bold red")
    else:
        yield Text(f"{number}. {title(defect.best.cause)}: {defect.best.sentence}", "bold red")
    if defect.runner_up is not None:
        other = defect.runner_up
        yield Text(f"   next best: {title(other.cause)}, which leaves {other.after:.1e} of {other.before:.1e}", "dim")


def _where(one: Added) -> str:
    place = one.place if one.place == one.yours else f"{one.place} ({one.yours} in yours)"
    return f"{_WORDS[one.part][1]} {place}"
