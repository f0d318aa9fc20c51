"""Runs a case with a defect in one backend; what the others compute of the same case is kept."""

from contextlib import ExitStack

from common.backends.columns import ALIASES
from common.parity.case import Case, Inputs, tasks
from common.parity.compare import Comparison
from common.parity.models import Pair
from common.parity.record import Record
from common.parity.session import Session, compare_case
from tests.mutants.planting import Planted


class Bench:
    """Of the backends of `session` only the one with the defect runs anew. What is kept lies in files until `stack`
    ends."""

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self._session = session
        self._stack = stack
        self._prepared: dict[Case, Inputs] = {}
        self._clean: dict[tuple[Case, str], dict[str, Record]] = {}

    def check(self, case: Case, backend: str, plant: str) -> list[Comparison]:
        """Compare the records of `case`, that of `backend` made with the defect `plant`, ``module:function``."""
        backend = ALIASES.get(backend, backend)
        if case not in self._prepared:
            self._prepared[case] = self._stack.enter_context(self._session.prepared(case))
        inputs = self._prepared[case]
        reference = self._session.references[0]
        records = {}
        for column in self._session.columns:
            if column == backend:
                records[column] = self._run_planted(column, inputs, column == reference, plant)
                continue
            if (case, column) not in self._clean:
                self._clean[case, column] = self._session.run(column, inputs, column == reference)
            records[column] = self._clean[case, column]
        return compare_case(case, records, reference)

    def explain(self, case: Case, backend: str, plant: str, compared: list[Comparison]) -> list[Pair]:
        """Where and why the backend with the defect differs, as a check that fails finds it out."""
        backend = ALIASES.get(backend, backend)
        wrap = {backend: lambda request: Planted(request=request, plant=plant)}
        return self._session.explain(self._prepared[case], compared, wrap=wrap)

    def _run_planted(self, column: str, inputs: Inputs, reference: bool, plant: str) -> dict[str, Record]:
        made = {}
        for task in tasks(inputs.case, reference=reference, soft=self._session.soft):
            output = inputs.folder / f"{column}-{task.name}-{plant}.safetensors"
            process = self._session.process(column)
            process.ask(Planted(request=inputs.request(task, column, process.threads, output), plant=plant))
            made[task.name] = Record.read(output)
        return made
