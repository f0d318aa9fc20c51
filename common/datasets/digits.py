"""The digits that scikit-learn ships: 1797 scans of handwriting, 8 x 8 pixels of 17 greys; nothing is downloaded.

They are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak 1998, UCI Machine
Learning Repository). The split is ours: of each class the last fifth of a fixed permutation is the test, 355 scans in
all, so that both parts hold the hands of all writers. A support vector machine classifies 98.9 % of these rightly.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from common.datasets.base import Bytes, Dataset, Records, Subset, fixed_permutation
from common.errors import DataError
from common.files import reason


def load() -> Dataset:
    """The digits, their values 0 … 16 spread over 0 … 255. Raises `DataError` where scikit-learn is not installed."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; run: pip install 'resnet-parity[data]'"
        )
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint16)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: the digits cannot be read: {reason(error)}; install scikit-learn again") from None
    pixels = ((table[:, :-1] * 255 + 8) // 16).astype(np.uint8)
    whole = Records((Bytes.of(pixels),), table[:, -1].astype(np.int64), (8, 8, 1))
    order = fixed_permutation(len(whole))
    by_class = [order[whole.labels[order] == label] for label in range(10)]
    test = np.concatenate([one[len(one) - len(one) // 5 :] for one in by_class])
    return Dataset(
        name="digits",
        train=Subset(whole, np.setdiff1d(order, test)),
        test=Subset(whole, np.sort(test)),
        classes=tuple("0123456789"),
        channels=1,
        size=(8, 8),
        # Of the 1442 scans to train on.
        mean=(0.3050,),
        std=(0.3755,),
        recipe="digits",
    )
