"""Inception v3: the specification, the layer walk, and the named variants.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015 (arXiv:1512.00567). The network that
everybody has is the one that its authors published, not that of the paper's table 1: Mixed_5b to Mixed_7c of TF-Slim's
`inception_v3.py`.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from common.architectures.layers import (
    INPUT,
    TRANSFORM_SCALE,
    TRANSFORM_SHIFT,
    Affine,
    AveragePool,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Dropout,
    GlobalPool,
    Layer,
    MaxPool,
    ReLU,
    RunningVariance,
    Softmax,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, head_changes
from common.errors import ParityError, SpecError
from common.fields import Between, Bound, Checked, Count, Counts, Positive, Share

Pool = Literal["average", "max"]
HeadPool = Literal["average", "max", "none"]

_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
_PUBLISHED_UNIT = 16
MOST_MODULES = 25  # of one resolution: torchvision's names have a letter for each, from a or from b on
_Few = Annotated[int, Bound(f"an integer of 1 to {MOST_MODULES}", lambda n: 1 <= n <= MOST_MODULES)]


@dataclass(frozen=True, kw_only=True)
class InceptionV3Spec(Checked):
    """Everything that fixes the function an Inception v3 computes; the defaults are torchvision's.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed. A
    field whose default is None follows from the others; it is filled in at construction and never None afterwards.
    """

    family: ClassVar[str] = "inception_v3"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "an inception_v3 spec"

    unit: Count = _PUBLISHED_UNIT  # channels: every width that is not a field is a published multiple of 16, of these
    # A module each at a resolution of 35: the channels behind its pool. By default 2, 4 and 4 units.
    pool_features: Counts = None  # type: ignore[assignment]
    # A module each at 17, behind the one that halves: the channels inside its 7x7. By default 8, 10, 10 and 12 units.
    channels_7x7: Counts = None  # type: ignore[assignment]
    wide_modules: _Few = 2  # those at 8, behind the one that halves
    in_channels: Count = 3
    classes: Count = 1000

    transform_input: Annotated[bool, _CONVENTION] = False  # images normalised by ImageNet's mean and deviation to ±1
    norm: Annotated[bool, Mark.ADOPTED] = True  # behind every convolution, which has a bias where there is none
    bn_scale: Annotated[bool, Mark.ADOPTED] = True  # whether norms have a scale besides their bias
    bn_eps: Annotated[Positive, _CONVENTION] = 1e-3
    bn_momentum: Annotated[Between, _CONVENTION] = 0.9  # share of the old running value that is kept
    running_variance: Annotated[RunningVariance, _CONVENTION] = "unbiased"  # N / (N - 1), or biased
    branch_pool: Annotated[Pool, _CONVENTION] = "average"  # of the modules that do not halve
    last_pool: Annotated[Pool, _CONVENTION] = "average"  # of the last module
    count_padding: Annotated[bool, _CONVENTION] = True  # in these averages, as zeros

    # Auxiliary logits, of the last map at 17.
    aux: Annotated[bool, Mark.EXTRA] = True
    aux_in_eval: Annotated[bool, Mark.UNSEEN | Mark.FREE] = False  # returned in eval mode too
    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "average"
    dropout: Annotated[Share, Mark.UNSEEN | Mark.FREE] = 0.5  # before the classifier; 0 is no layer
    head: Annotated[Head, Mark.UNSEEN] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.follow("pool_features", tuple(map(self.width, (32, 64, 64))))
        self.follow("channels_7x7", tuple(map(self.width, (128, 160, 160, 192))))
        for name in ("pool_features", "channels_7x7"):
            self.require(name, len(getattr(self, name)) <= MOST_MODULES, f"at most {MOST_MODULES} entries")
        self.require("transform_input", not self.transform_input or self.in_channels == 3, "false but of 3 channels")
        if self.head == "none":
            self.require("aux", not self.aux, "false with head none: auxiliary logits are a classifier's")
        else:
            self.require("head_pool", self.head_pool != "none", f"average or max with head {self.head}")

    def width(self, published: int) -> int:
        """Channels of what has so many in the published network."""
        return published * self.unit // _PUBLISHED_UNIT

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed; a module's own channels follow a new unit unless they are given
        too."""
        self.check_names(changes)
        anew: dict[str, Any] = {}
        if changes.get("unit", self.unit) != self.unit:
            anew = {"pool_features": None, "channels_7x7": None}
        return replace(self, **(anew | changes))

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, or another end: ``logits``, ``softmax``, or ``none``, which
        leaves the auxiliary logits off too and returns the last map, pooled by `pool` into a vector an image."""
        return self.replace(**head_changes(self, "average", classes=classes, head=head, pool=pool))

    @property
    def input_size(self) -> tuple[int, ...]:
        """Empty: it takes images of any size."""
        return ()

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction."""
        return 32

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
        return 299, 299

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        return self.replace(
            transform_input=False,
            norm=False,
            branch_pool="max",
            last_pool="max",
            aux=False,
            head_pool="max" if self.head_pool == "average" else self.head_pool,
            dropout=0.0,
            head="none" if self.head == "none" else "logits",
        )

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the modules at each of the three resolutions."""
        counts = (len(self.pool_features), 1 + len(self.channels_7x7), 1 + self.wide_modules)
        return tuple(tuple(f"stages.{s}.blocks.{b}" for b in range(count)) for s, count in enumerate(counts))

    @property
    def norm_options(self) -> dict[str, Any]:
        """What all norms have in common, as every backend's maker of norms takes it."""
        averaged = {"momentum": self.bn_momentum, "running_variance": self.running_variance}
        return {"eps": self.bn_eps, "scale": self.bn_scale, **averaged}

    @property
    def wide_pools(self) -> tuple[Pool, ...]:
        """What the pool of each module at 8 takes, of those that do not halve."""
        return (*(self.branch_pool,) * (self.wide_modules - 1), self.last_pool)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order."""
        return tuple(_Walk(self).layers)

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of layers that are used together: the stem, each module, the auxiliary branch, the classifier; in
        order, every layer once."""
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            where = layer.path.split(".")
            group = ".".join(where[:4]) if where[0] == "stages" else where[0]
            groups.setdefault(group, []).append(layer.path)
        return tuple(map(tuple, groups.values()))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the last layer at each resolution, at strides of 2, 4, 8, 16 and 32."""
        return ("stem.2b.relu", "stem.4a.relu", *(f"{blocks[-1]}.concat" for blocks in self.blocks))


class _Walk:
    """The layers; each method takes and returns paths, as the models' take and return tensors."""

    def __init__(self, spec: InceptionV3Spec) -> None:
        self.spec = spec
        self.layers: list[Layer] = []
        self.channels = {INPUT: spec.in_channels}
        self.training_only = False
        x = self.stem()
        for path, features in zip(spec.blocks[0], spec.pool_features, strict=True):
            x = self.module_a(path, x, features)
        halving, *others = spec.blocks[1]
        x = self.module_b(halving, x)
        for path, channels in zip(others, spec.channels_7x7, strict=True):
            x = self.module_c(path, x, channels)
        if spec.aux:
            self.training_only = not spec.aux_in_eval
            self.auxiliary(x)
            self.training_only = False
        halving, *others = spec.blocks[2]
        x = self.module_d(halving, x)
        for path, pool in zip(others, spec.wide_pools, strict=True):
            x = self.module_e(path, x, pool)
        self.head(x)

    def add(self, kind: type[Layer], path: str, *inputs: str, gives: int | None = None, **options: Any) -> str:
        """A layer; it has as many channels as its input unless it is said."""
        self.layers.append(kind(path=path, inputs=inputs, training_only=self.training_only, **options))
        self.channels[path] = self.channels[inputs[0]] if gives is None else gives
        return path

    def conv(
        self, path: str, x: str, width: int, kernel: int | tuple[int, int] = 1, stride: int = 1, *, padded: bool = True
    ) -> str:
        """A convolution, its norm and its ReLU; not `padded` where it strides."""
        spec = self.spec
        padding = "symmetric" if padded and stride == 1 else "valid"
        sides: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
        widths = {"in_channels": self.channels[x], "out_channels": width}
        x = self.add(Conv, f"{path}.conv", x, gives=width, **widths, **sides, bias=not spec.norm)
        if spec.norm:
            x = self.add(BatchNorm, f"{path}.norm", x, channels=width, **spec.norm_options)
        return self.add(ReLU, f"{path}.relu", x)

    def pool(self, path: str, x: str, op: Pool) -> str:
        """That of a module which does not halve: 3x3, at every pixel."""
        sides: dict[str, Any] = {"kernel": 3, "stride": 1, "padding": "symmetric"}
        if op == "max":
            return self.add(MaxPool, f"{path}.pool", x, **sides)
        return self.add(AveragePool, f"{path}.pool", x, **sides, count_padding=self.spec.count_padding)

    def halved(self, path: str, x: str) -> str:
        return self.add(MaxPool, path, x, kernel=3, stride=2, padding="valid")

    def concat(self, path: str, *branches: str) -> str:
        return self.add(Concat, path, *branches, gives=sum(self.channels[branch] for branch in branches))

    def stem(self) -> str:
        c = self.spec.width
        x = INPUT
        if self.spec.transform_input:
            x = self.add(Affine, "stem.affine", x, scale=TRANSFORM_SCALE, shift=TRANSFORM_SHIFT)
        x = self.conv("stem.1a", x, c(32), 3, stride=2)
        x = self.conv("stem.2a", x, c(32), 3, padded=False)
        x = self.conv("stem.2b", x, c(64), 3)
        x = self.halved("stem.pool1", x)
        x = self.conv("stem.3b", x, c(80))
        x = self.conv("stem.4a", x, c(192), 3, padded=False)
        return self.halved("stem.pool2", x)

    def module_a(self, path: str, x: str, features: int) -> str:
        c = self.spec.width
        branch1x1 = self.conv(f"{path}.branch1x1", x, c(64))
        branch5x5 = self.conv(f"{path}.branch5x5_1", x, c(48))
        branch5x5 = self.conv(f"{path}.branch5x5_2", branch5x5, c(64), 5)
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_1", x, c(64))
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_2", branch3x3dbl, c(96), 3)
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_3", branch3x3dbl, c(96), 3)
        branch_pool = self.pool(path, x, self.spec.branch_pool)
        branch_pool = self.conv(f"{path}.branch_pool", branch_pool, features)
        return self.concat(f"{path}.concat", branch1x1, branch5x5, branch3x3dbl, branch_pool)

    def module_b(self, path: str, x: str) -> str:
        c = self.spec.width
        branch3x3 = self.conv(f"{path}.branch3x3", x, c(384), 3, stride=2)
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_1", x, c(64))
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_2", branch3x3dbl, c(96), 3)
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_3", branch3x3dbl, c(96), 3, stride=2)
        return self.concat(f"{path}.concat", branch3x3, branch3x3dbl, self.halved(f"{path}.pool", x))

    def module_c(self, path: str, x: str, inner: int) -> str:
        c = self.spec.width
        branch1x1 = self.conv(f"{path}.branch1x1", x, c(192))
        branch7x7 = self.conv(f"{path}.branch7x7_1", x, inner)
        branch7x7 = self.conv(f"{path}.branch7x7_2", branch7x7, inner, (1, 7))
        branch7x7 = self.conv(f"{path}.branch7x7_3", branch7x7, c(192), (7, 1))
        branch7x7dbl = self.conv(f"{path}.branch7x7dbl_1", x, inner)
        branch7x7dbl = self.conv(f"{path}.branch7x7dbl_2", branch7x7dbl, inner, (7, 1))
        branch7x7dbl = self.conv(f"{path}.branch7x7dbl_3", branch7x7dbl, inner, (1, 7))
        branch7x7dbl = self.conv(f"{path}.branch7x7dbl_4", branch7x7dbl, inner, (7, 1))
        branch7x7dbl = self.conv(f"{path}.branch7x7dbl_5", branch7x7dbl, c(192), (1, 7))
        branch_pool = self.pool(path, x, self.spec.branch_pool)
        branch_pool = self.conv(f"{path}.branch_pool", branch_pool, c(192))
        return self.concat(f"{path}.concat", branch1x1, branch7x7, branch7x7dbl, branch_pool)

    def module_d(self, path: str, x: str) -> str:
        c = self.spec.width
        branch3x3 = self.conv(f"{path}.branch3x3_1", x, c(192))
        branch3x3 = self.conv(f"{path}.branch3x3_2", branch3x3, c(320), 3, stride=2)
        branch7x7x3 = self.conv(f"{path}.branch7x7x3_1", x, c(192))
        branch7x7x3 = self.conv(f"{path}.branch7x7x3_2", branch7x7x3, c(192), (1, 7))
        branch7x7x3 = self.conv(f"{path}.branch7x7x3_3", branch7x7x3, c(192), (7, 1))
        branch7x7x3 = self.conv(f"{path}.branch7x7x3_4", branch7x7x3, c(192), 3, stride=2)
        return self.concat(f"{path}.concat", branch3x3, branch7x7x3, self.halved(f"{path}.pool", x))

    def module_e(self, path: str, x: str, pool: Pool) -> str:
        c = self.spec.width
        branch1x1 = self.conv(f"{path}.branch1x1", x, c(320))
        branch3x3 = self.conv(f"{path}.branch3x3_1", x, c(384))
        branch3x3 = self.forked(path, "branch3x3", branch3x3, "_2a", "_2b")
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_1", x, c(448))
        branch3x3dbl = self.conv(f"{path}.branch3x3dbl_2", branch3x3dbl, c(384), 3)
        branch3x3dbl = self.forked(path, "branch3x3dbl", branch3x3dbl, "_3a", "_3b")
        branch_pool = self.pool(path, x, pool)
        branch_pool = self.conv(f"{path}.branch_pool", branch_pool, c(192))
        return self.concat(f"{path}.concat", branch1x1, branch3x3, branch3x3dbl, branch_pool)

    def forked(self, path: str, branch: str, x: str, *ends: str) -> str:
        """Two convolutions of the same map, side by side."""
        c = self.spec.width
        row = self.conv(f"{path}.{branch}{ends[0]}", x, c(384), (1, 3))
        column = self.conv(f"{path}.{branch}{ends[1]}", x, c(384), (3, 1))
        return self.concat(f"{path}.{branch}", row, column)

    def auxiliary(self, x: str) -> None:
        c = self.spec.width
        pool: dict[str, Any] = {"kernel": 5, "stride": 3, "padding": "valid"}
        x = self.add(AveragePool, "aux.pool", x, **pool, count_padding=self.spec.count_padding)
        x = self.conv("aux.conv0", x, c(128))
        x = self.conv("aux.conv1", x, c(768), 5, padded=False)
        x = self.add(GlobalPool, "aux.average", x, op="average")
        self.dense("aux.fc", x)

    def head(self, x: str) -> None:
        spec = self.spec
        if spec.head_pool != "none":
            x = self.add(GlobalPool, "head.pool", x, op=spec.head_pool)
        if spec.head == "none":
            return
        if spec.dropout:
            x = self.add(Dropout, "head.dropout", x, rate=spec.dropout)
        x = self.dense("head.fc", x)
        if spec.head == "softmax":
            self.add(Softmax, "head.softmax", x)

    def dense(self, path: str, x: str) -> str:
        return self.add(Dense, path, x, in_features=self.channels[x], out_features=self.spec.classes)


# Published conventions: what each source does differently from torchvision's constructor.
CONVENTIONS: dict[str, dict[str, Any]] = {
    # torchvision's published weights: ported from TF-Slim, whose images are from -1 to 1.
    "transform_input": {"transform_input": True},
    "no_aux": {"aux": False},
    # Returns a pair in eval mode too, where it has auxiliary logits; by default it has none.
    "timm": {"aux": False, "aux_in_eval": True, "dropout": 0.0},
    # Of its published weights: where torchvision's average counts the zeros at the borders, this is another function.
    "keras_applications": {
        "bn_scale": False,
        "bn_momentum": 0.99,
        "running_variance": "biased",
        "count_padding": False,
        "aux": False,
        "dropout": 0.0,
        "head": "softmax",
    },
    # With a class for the background, before the others.
    "slim": {"bn_scale": False, "bn_momentum": 0.9997, "count_padding": False, "dropout": 0.2, "classes": 1001},
    # The graph that the Frechet Inception distance is defined by, as pytorch-fid has it.
    "fid": {"count_padding": False, "last_pool": "max", "aux": False, "classes": 1008},
}


def _variants() -> dict[str, InceptionV3Spec]:
    spec = InceptionV3Spec()
    conventions = {f"inception_v3.{name}": spec.replace(**changes) for name, changes in CONVENTIONS.items()}
    return {"inception_v3": spec} | conventions


VARIANTS = _variants()
TITLES = {"inception_v3": "InceptionV3"}
Spec = InceptionV3Spec
