"""A comparison of a user's models, as a person reads it: the levels, where they part, and why."""

from rich.console import Console, Group, RenderableType
from rich.text import Text

from common.parity.models import ModelsResult, Pair
from common.report.console import comparison
from common.report.explained import Line, explained


def result(found: ModelsResult) -> Group:
    """What was compared, a table for each level, and on failure where it begins and why."""
    parts: list[RenderableType] = [Text(""), Text(" | ".join(found.names), "bold")]
    parts += [Line(Text(_matched(pair), "dim"), 2) for pair in found.pairs]
    notes = [*found.notes, *(f"{name}: {' | '.join(each)}" for name, each in _other_versions(found).items())]
    parts += [Line(Text(note, "yellow"), 2) for note in notes]
    parts += [comparison(compared, named=len(found.names) > 2) for compared in found.comparisons]
    for pair in found.pairs:
        parts += explained(pair)
    verdict = Text("SAME FUNCTION", "bold green") if found.passed else Text("NOT SHOWN TO BE THE SAME", "bold red")
    parts.append(Text.assemble("  ", verdict, f"  {' | '.join(found.names)}, {found.seconds:.1f} s"))
    return Group(*parts)


def text(shown: RenderableType, colours: bool = False) -> str:
    """Without colours, for a log or an exception; or with a terminal's codes for them."""
    console = Console(
        width=132,
        force_terminal=colours,
        color_system="standard" if colours else None,
        highlight=False,
        legacy_windows=False,
    )
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip()


def _other_versions(found: ModelsResult) -> dict[str, tuple[str, ...]]:
    """What all of them have in a version each, and not the same."""
    versions = [found.versions[name] for name in found.names if name in found.versions]
    shared = [name for name in versions[0] if all(name in one for one in versions)] if versions else []
    each = {name: tuple(one[name] for one in versions) for name in shared}
    # Every framework calls a processor something else.
    return {name: values for name, values in each.items() if len(set(values)) > 1 and name != "device"}


def _matched(pair: Pair) -> str:
    ours, theirs = pair.matching.unmatched
    return (
        f"reference {pair.reference}, yours {pair.other}: {len(pair.matching.calls)} layers, "
        f"{len(pair.matching.arrays)} arrays and {len(pair.matching.parameters)} parameters matched; layers that stay "
        f"alone: {len(ours)} and {len(theirs)}"
    )
