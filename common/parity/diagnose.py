"""From where two models differ to why: gathers the evidence of each failing place, and asks for its causes."""

from common.diagnosis.evidence import Diagnosis
from common.parity.localise import Localised
from common.parity.matching import Matching
from common.parity.record import Record


def diagnose(reference: Record, other: Record, matching: Matching, localised: Localised) -> Diagnosis:
    """Every defect that `localised` shows, with its causes."""
    del reference, other, matching, localised
    return Diagnosis()
