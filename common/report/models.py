"""A comparison of a user's models, as a person reads it: the levels, where they part, and why."""

from rich.console import Console, Group, RenderableType
from rich.text import Text

from common.parity.models import ModelsResult, Pair
from common.report.console import comparison
from common.report.explained import explained


def result(found: ModelsResult) -> Group:
    """What was compared, a table for each level, and on failure where it begins and why."""
    parts: list[RenderableType] = [Text(""), Text(" | ".join(found.names), "bold")]
    parts += [Text(f"  {_matched(pair)}", "dim") for pair in found.pairs]
    parts += [Text(f"  {note}", "yellow") for note in found.notes]
    parts += [comparison(compared) for compared in found.comparisons]
    for pair in found.pairs:
        parts += explained(pair)
    verdict = Text("SAME FUNCTION", "bold green") if found.passed else Text("NOT SHOWN TO BE THE SAME", "bold red")
    parts.append(Text.assemble("  ", verdict, f"  {' | '.join(found.names)}, {found.seconds:.1f} s"))
    return Group(*parts)


def text(shown: RenderableType) -> str:
    """Without colours, for a log or an exception."""
    console = Console(width=132, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip()


def _matched(pair: Pair) -> str:
    ours, theirs = pair.matching.unmatched
    return (
        f"{pair.reference} and {pair.other}: {len(pair.matching.calls)} layers, {len(pair.matching.arrays)} arrays and "
        f"{len(pair.matching.parameters)} parameters matched; layers that stay alone: {len(ours)} and {len(theirs)}"
    )
