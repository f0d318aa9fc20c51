"""ResNet-50 v1.5 (He et al. 2015; the stride stands on the 3x3 convolution) in PyTorch."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """1x1 to a narrow map, 3x3 in it, 1x1 to four times its width; and the input added."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.reduce = nn.Conv2d(width_in, width, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(width)
        self.spatial = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.spatial_norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, wide, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(wide)
        self.project = None
        if stride != 1 or width_in != wide:
            self.project = nn.Conv2d(width_in, wide, 1, stride, bias=False)
            self.project_norm = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.reduce_norm(self.reduce(x)))
        y = functional.relu(self.spatial_norm(self.spatial(y)))
        y = self.expand_norm(self.expand(y))
        if self.project is not None:
            x = self.project_norm(self.project(x))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        width_in = width
        self.stages = nn.ModuleList()
        for number, depth in enumerate(depths):
            narrow = width * 2**number
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(width_in, narrow, stride=2 if i == 0 and number > 0 else 1))
                width_in = 4 * narrow
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.stem_norm(self.stem(x))))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def model() -> tuple[ResNet, Tensor]:
    """The model with weights of its own for every layer, and images to call it with."""
    torch.manual_seed(0)
    made = ResNet().eval()
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            # As trained ones are, none like another: zeros and ones would hide which is which.
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.4, 1.0)
                layer.bias.normal_(0, 0.1)
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
    return made, torch.randn(2, 3, 64, 64)
