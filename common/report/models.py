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
    parts += [Text(f"  {name}: {' | '.join(each)}", "yellow") for name, each in _other_versions(found).items()]
    parts += [comparison(compared) for compared in found.comparisons]
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


<<<<<<< HEAD
def localised(found: Localised) -> Group:
    """Each place that adds an error of its own, and where that begins, forwards and backwards."""
    parts: list[RenderableType] = [Text("  L3 each layer alone, on the reference's own input", "bold")]
    failing = found.failing
    if not failing:
        parts.append(Text("    no layer adds more than rounding: the difference grows out of it", "yellow"))
        return Group(*parts)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column, justify in (("layer", "left"), ("in yours", "left"), ("of", "left"), ("mode", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("added", "inherited", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    forward = [one for one in failing if not one.backward]
    shown = (forward or list(failing))[:_MOST]
    for one in shown:
        inherited = "" if one.inherited is None else f"{one.inherited:.1e}"
        table.add_row(
            one.place,
            one.yours,
            _WORDS[one.part],
            one.run,
            Text(f"{one.added:.1e}", "bold red"),
            inherited,
            f"{one.limit:.0e}",
        )
    parts.append(Padding(table, (0, 0, 0, 4), expand=False))
    if len(failing) > len(shown):
        rest = len(failing) - len(shown)
        parts.append(
            Text(f"    … and {rest} more, of these on the way back {sum(one.backward for one in failing)}", "dim")
        )
    for words, first in (("forwards", found.first), ("backwards", found.first_backward)):
        if first is not None:
            parts.append(Text(f"    first {words}: {_where(first)}, added {first.added:.1e}", "bold red"))
    return Group(*parts)


def diagnosis(found: Diagnosis) -> Group:
    """Each defect in a sentence with its proof, and what comes next."""
    parts: list[RenderableType] = [Text("  diagnosis", "bold")]
    for number, defect in enumerate(found.defects, 1):
        parts += [Padding(line, (0, 0, 0, 4)) for line in _defect(number, defect)]
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
    return f"{_WORDS[one.part]} at {place}" if one.part != "result" else f"what the model returns ({place})"


def _other_versions(found: ModelsResult) -> dict[str, tuple[str, ...]]:
    """What all of them have in a version each, and not the same."""
    versions = [found.versions[name] for name in found.names if name in found.versions]
    shared = [name for name in versions[0] if all(name in one for one in versions)] if versions else []
    each = {name: tuple(one[name] for one in versions) for name in shared}
    return {name: values for name, values in each.items() if len(set(values)) > 1}


=======
>>>>>>> main
def _matched(pair: Pair) -> str:
    ours, theirs = pair.matching.unmatched
    return (
        f"{pair.reference} and {pair.other}: {len(pair.matching.calls)} layers, {len(pair.matching.arrays)} arrays and "
        f"{len(pair.matching.parameters)} parameters matched; layers that stay alone: {len(ours)} and {len(theirs)}"
    )
