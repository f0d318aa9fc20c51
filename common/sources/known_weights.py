"""The published weights that are known by name: where they are, what they must hash to, and how to feed them."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common import architectures
from common.architectures import Spec

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class KnownWeights:
    """One file of published weights; an entry of a table."""

    reference: str  # what a person writes: source:variant:tag, or hf://owner/repo
    variant: str
    url: str | None = None  # none where the hub resolves it
    checksum: str | None = None  # algorithm:digits, of the whole file; the digits may be the first ones only
    convention: str = "torchvision"
    preprocessing: str  # a name in `images.PRESETS`
    resize: int | None = None  # of the shorter side, where it is not the preset's
    crop: int | None = None
    interpolation: str | None = None
    top1: float | None = None  # percent of ImageNet's validation set, as published
    top5: float | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """What is to be changed of the preset."""
        own = {"resize": self.resize, "crop": self.crop, "interpolation": self.interpolation}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def spec(self) -> Spec:
        """The network these weights belong to, under the convention they were trained with."""
        named = self.variant if self.convention == "torchvision" else f"{self.variant}.{self.convention}"
        spec = architectures.find(named)
        return spec.with_head(head="none", pool="average") if self.reference.endswith(":notop") else spec


@cache
def table() -> tuple[KnownWeights, ...]:
    """All of them: a table for each family, by its name."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.toml"))]
    entries = [entry for text in texts for entry in tomllib.loads(text)["weights"]]
    return tuple(KnownWeights(**{"variant": _variant(entry["reference"]), **entry}) for entry in entries)


def find(reference: str) -> KnownWeights | None:
    """The entry whose reference, or whose URL, this is."""
    return next((known for known in table() if reference in (known.reference, known.url)), None)


def _variant(reference: str) -> str:
    """The middle of source:variant:tag."""
    return reference.split(":")[1]
