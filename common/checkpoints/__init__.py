"""A reference in, a checkpoint out, and back: ``read(reference)``, ``write(path, checkpoint)``.

    found = checkpoints.read("torchvision:resnet50:IMAGENET1K_V2")
    checkpoints.write("resnet50.safetensors", found)

No framework is needed to read anything, and nothing in a file is ever executed. A format is a naming (`common.names`)
in a container (`containers`); which of each a file is, is told from its content.
"""

from common.checkpoints.checkpoint import Checkpoint, Origin
from common.checkpoints.read import Given, adopt, read, read_for, weights_for
from common.checkpoints.write import Written, check_target, write
from common.names import CANONICAL, formats

__all__ = [
    "CANONICAL",
    "Checkpoint",
    "Given",
    "Origin",
    "Written",
    "adopt",
    "check_target",
    "formats",
    "read",
    "read_for",
    "weights_for",
    "write",
]
