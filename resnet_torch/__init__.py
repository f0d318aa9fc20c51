"""Networks in PyTorch, as torchvision lays them out: ``from resnet_torch import resnet50``.

Importing this package loads nothing; PyTorch comes with the first name that is asked for.
"""

import sys
from typing import TYPE_CHECKING, Any

from common.architectures import title
from common.backends.facade import Facade, Package, families

if TYPE_CHECKING:
    from torch import nn

_facade: "Facade[nn.Module]" = Facade(
    __name__,
    frameworks={"torch": ("PyTorch", "torch")},
    spelling=str,
    others={
        **{title(family): family for family in families(__name__)},
        **dict.fromkeys(("load_weights", "export_weights"), "weights"),
    },
)
from_spec, from_checkpoint, framework = _facade.from_spec, _facade.from_checkpoint, _facade.framework
__all__ = _facade.names
sys.modules[__name__].__class__ = Package


def __getattr__(name: str) -> Any:
    return _facade.find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
