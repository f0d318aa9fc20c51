"""What a diagnosis says of a planted fault, and whether that is right."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from common.diagnosis.evidence import Explained, Finding
from common.parity.models import ModelsResult, compare_models
from tests.faults.catalogue import images, made
from tests.faults.planting import Fault, Twice


@dataclass(frozen=True, kw_only=True)
class Answer:
    """To one planted fault."""

    result: ModelsResult
    unread: frozenset[str]  # of the plan: what was not planted
    seconds: float

    @property
    def defects(self) -> tuple[Explained, ...]:
        return self.result.diagnosis.defects

    @property
    def findings(self) -> list[Finding]:
        """Of the first defect, best first."""
        if not self.defects:
            return []
        first = self.defects[0]
        return [one for one in (first.best, first.runner_up, *first.others) if one is not None]

    def rank(self, fault: Fault) -> int | None:
        """Where among them the cause stands, at the right place; None where it does not."""
        causes = {fault.cause, *fault.also}
        for rank, one in enumerate(self.findings, 1):
            if one.cause in causes and at(one.place, fault.layer):
                return rank
        return None


def at(place: str, layer: str) -> bool:
    """Whether a finding is of that layer, or of what goes into it; "" is the output."""
    if not layer:
        return place == "the output"
    names = place.removeprefix("the input of ").replace("(", " ").replace(")", " ").split()
    return any(name == layer or name.startswith((f"{layer}/", f"{layer}.")) for name in names)


def answer(fault: Fault | Twice) -> Answer:
    """Compare the port with the reference."""
    started = time.perf_counter()
    dtypes: Sequence[str] = fault.dtypes if isinstance(fault, Fault) else ("float64",)
    reference, _ = made(fault.reference)
    port, plan = made(fault.port, fault)
    modes = fault.modes
    result = compare_models(reference, port, inputs=images(fault.reference), modes=modes, dtypes=dtypes)  # type: ignore[arg-type]
    return Answer(result=result, unread=frozenset(plan.unread), seconds=time.perf_counter() - started)


def clean(reference: str, port: str) -> ModelsResult:
    """Compare two models that are one function. Of grouped convolutions TensorFlow has no gradients on a CPU."""
    modes = ("eval",) if "keras subclass" in (reference, port) else ("eval", "grad")
    models = made(reference)[0], made(port)[0]
    return compare_models(*models, inputs=images(reference), modes=modes, dtypes=("float64",))  # type: ignore[arg-type]
