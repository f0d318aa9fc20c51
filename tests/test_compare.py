"""Records and their comparison, on arrays made up here: what passes, what fails, at which limit, and who is blamed."""

import io
import json
import struct
from math import inf, nan, prod
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from common import architectures
from common.architectures.layers import INPUT
from common.architectures.resnet import ResNetSpec
from common.errors import BackendCrashed, ParityError, RecordError
from common.parity import record, steps
from common.parity.case import Case
from common.parity.compare import Comparison, compare, rounded_to_float32
from common.parity.levels import ORDER_LIMIT, RESPONSE_FACTOR, UNIT
from common.parity.names import ArrayName
from common.parity.orders import orders
from common.parity.record import Manifest, Record
from common.parity.session import CheckResult, compare_files
from common.parity.subjects import arrays_of_passes, arrays_of_steps
from common.report import console, junit, networks
from common.report import json as report_json
from common.training import recipe as recipes
from common.training.recipe import TrainingRecipe

SPEC = ResNetSpec(
    block="basic", blocks=(1, 1), widths=(4, 8), stem_kernel=3, stem_stride=1, stem_width=4, stem_pool=False,
    conv_bias=True, classes=5,
)  # fmt: skip
SHAPE = (2, 8, 8, 3)
FIVE = ("torch", "keras:tensorflow", "keras:jax", "keras:torch", "flax")
THREE = ("torch", "keras:tensorflow", "flax")
TWO = ("torch", "flax")
ALL = ("eval", "train", "grad")
CONV = "eval/tap/stages.0.blocks.0.conv1"
RECIPE = TrainingRecipe(steps=3)
STEPS = ("steps",)


def described(modes, shape=SHAPE):
    """The arrays of a record of these modes, as its manifest has them."""
    found = arrays_of_passes(SPEC, modes, shape)
    return (*found, *(arrays_of_steps(SPEC, RECIPE, shape) if "steps" in modes else ()))


def expected_arrays(modes, shape=SHAPE):
    return {array.name: array.shape for array in described(modes, shape)}


def named(name):
    return ArrayName.parse(name)


def arrays(modes=("eval",), dtype="float64"):
    """An array of every name and shape that a record holds, of random float32 numbers; the first value is 0, where a
    single difference of any size can be planted exactly."""
    made = {}
    for name, shape in expected_arrays(modes).items():
        value = np.random.default_rng(list(name.encode())).normal(size=shape).astype(np.float32).astype(dtype)
        if value.size > 1:
            value.flat[0] = 0
        made[name] = np.asarray(value)
    return made


def responses(values, relative):
    return {name: relative * record.norm(value) for name, value in values.items()}


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


def writer(folder):
    """Writes a record and opens it: `change` maps names to functions of the array, or to None for a missing one."""

    def write_record(backend, change=None, *, name=None, modes=("eval",), dtype="float64", response=None, **manifest):
        values = arrays(modes, dtype)
        reference = responses(values, 1e-12 if dtype == "float64" else 1e-6) if response is None else response
        for tensor, function in (change or {}).items():
            if function is None:
                del values[tensor]
            else:
                values[tensor] = np.asarray(function(values[tensor]))
        path = folder / f"{name or backend.replace(':', '-')}-{dtype}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = manifest.get("shape", SHAPE)
        fields = {
            "backend": backend,
            "variant": "tiny",
            "subject": architectures.to_dict(SPEC),
            "arrays": described(modes, shape),
            "dtype": dtype,
            "modes": modes,
            "versions": {backend: "1.0"},
            "device": "cpu",
            "threads": 1,
            "seed": 0,
            "inputs": "1234",
            "weights": "5678",
            "source": "random noise",
            "shape": SHAPE,
            "draws": 3,
            "response": reference,
            "orders": 1,
        }
        if "steps" in modes:
            fields |= {"recipe": recipes.to_dict(RECIPE), "batches": "90"}
        record.write(path, {named(key): value for key, value in values.items()}, Manifest(**(fields | manifest)))
        return Record.read(path)

    return write_record


def put(value, place=0):
    """Sets one value."""

    def change(array):
        array = array.copy()
        array.flat[place] = value
        return array

    return change


def verdicts(compared, tensor):
    return {d.verdict for d in compared.differences if str(d.tensor) == tensor}


class TestRecord:
    def test_a_record_comes_back_bitwise_with_its_manifest(self, write):
        made = write("torch", modes=ALL, not_restored=("stem.conv.kernel",))
        values = arrays(ALL)
        assert set(map(str, made)) == set(values)
        assert len(made) == len(values)
        for name, value in values.items():
            assert made[named(name)].shape == value.shape
            assert made[named(name)].tobytes() == value.tobytes()
        assert made.manifest.subject == architectures.to_dict(SPEC)
        assert (made.manifest.shape, made.manifest.modes, made.manifest.seed) == (SHAPE, ALL, 0)
        assert made.manifest.not_restored == ("stem.conv.kernel",)
        assert made.manifest.response == responses(values, 1e-12)
        assert made.get(named("eval/tap/none")) is None
        with pytest.raises(KeyError):
            made[named("eval/tap/none")]

    @pytest.mark.parametrize(
        ("modes", "kinds"),
        [
            (("eval",), {"eval/tap", "eval/loss"}),
            (("train",), {"train/tap", "train/loss", "train/stat"}),
            (("grad",), {"eval/grad", "train/grad"}),
            (("eval", "grad"), {"eval/tap", "eval/loss", "eval/grad", "train/grad"}),
            (("exact",), {"exact/tap"}),
            (
                ("eval", "steps"),
                {"eval/tap", "eval/loss"}
                | {f"step0{k}/{kind}" for k in (1, 2, 3) for kind in ("loss", "stat", "velocity", "param")},
            ),
        ],
    )
    def test_the_arrays_expected_are_those_of_the_modes(self, modes, kinds):
        expected = expected_arrays(modes)
        assert {"/".join(name.split("/")[:2]) for name in expected} == kinds
        taps = [name.split("/", 2)[2] for name in expected if "/tap/" in name]
        assert taps == ([layer.path for layer in SPEC.layers] if taps else [])
        for run in ("eval", "train"):
            gradients = {name.split("/", 2)[2] for name in expected if name.startswith(f"{run}/grad/")}
            parameters = {name for layer in SPEC.layers for name in layer.parameters}
            assert gradients in (set(), parameters | {INPUT})

    def test_arrays_are_expected_with_the_shapes_of_the_walk(self):
        expected = expected_arrays(ALL)
        assert expected["eval/tap/stages.1.blocks.0.relu"] == (2, 4, 4, 8)
        assert expected["train/tap/head.fc"] == (2, 5)
        assert expected["eval/loss"] == ()
        assert expected["eval/grad/stem.conv.kernel"] == (3, 3, 3, 4)
        assert expected["train/grad/input"] == SHAPE
        assert expected["train/stat/stem.norm.var"] == (4,)

    def test_a_record_of_steps_holds_its_recipe(self, write):
        made = write("torch", modes=STEPS)
        assert (made.manifest.recipe, made.manifest.batches) == (recipes.to_dict(RECIPE), "90")

    @pytest.mark.parametrize("recipe", [None, {}, [], 3])
    def test_a_record_of_steps_with_a_damaged_recipe_is_refused(self, write, recipe):
        path = write("torch", modes=STEPS).path
        self.rewrite(path, lambda m: m.update(manifest=json.dumps(json.loads(m["manifest"]) | {"recipe": recipe})))
        with pytest.raises(RecordError) as caught:
            Record.read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    def test_a_file_cut_off_anywhere_is_refused(self, write):
        path = write("torch").path
        raw = path.read_bytes()
        for cut in (*range(10), *range(10, len(raw), 1801), len(raw) - 1):
            path.write_bytes(raw[:cut])
            with pytest.raises(RecordError) as caught:
                Record.read(path)
            assert str(caught.value).startswith(f"{path}: cannot be read as safetensors: ")
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("make", ["missing", "folder"])
    def test_a_path_that_is_no_file_is_refused(self, tmp_path, make):
        path = tmp_path if make == "folder" else tmp_path / "none"
        with pytest.raises(RecordError, match="Is a directory" if make == "folder" else "No such file or directory"):
            Record.read(path)

    @staticmethod
    def rewrite(path, change):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header["__metadata__"])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda m: m.update(format="resnet-parity weights 1"), "not a record: format is 'resnet-parity weights 1'"),
            (lambda m: m.update(format="resnet-parity record 1"), "not a record: format is 'resnet-parity record 1'"),
            (lambda m: m.pop("format"), "not a record: format is None"),
            (lambda m: m.pop("manifest"), "the manifest is damaged"),
            (lambda m: m.update(manifest="{"), "the manifest is damaged"),
            (lambda m: m.update(manifest="[" * 100_000), "the manifest is damaged"),
            (lambda m: m.update(manifest="[]"), "the manifest is damaged"),
            (lambda m: m.update(manifest="null"), "the manifest is damaged"),
            (lambda m: m.update(manifest="{}"), "the manifest is damaged"),
        ],
        ids=range(9),
    )
    def test_metadata_that_are_no_records_are_refused(self, write, change, expected):
        path = write("torch").path
        self.rewrite(path, change)
        with pytest.raises(RecordError) as caught:
            Record.read(path)
        assert str(caught.value).startswith(f"{path}: {expected}")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("subject", [1]),
            ("subject", None),
            ("arrays", None),
            ("arrays", [{"name": "eval/tap/stem.conv"}]),
            ("arrays", [{"name": "evil/tap/stem.conv", "shape": [2], "layer": ""}]),
            ("arrays", [{"name": "eval/tap/stem.conv", "shape": [-2], "layer": ""}]),
            ("response", {"stem.conv": 1.0}),
            ("dtype", "float23"),
            ("dtype", 64),
            ("modes", "eval"),
            ("modes", []),
            ("modes", ["evil"]),
            ("shape", []),
            ("shape", [2, 8, 8, 0]),
            ("shape", None),
            ("response", None),
            ("response", {"eval/loss": "small"}),
            ("response", {"eval/loss": -1.0}),
            ("order_response", {"eval/loss": -1.0}),
            ("order_response", []),
            ("orders", "2"),
            ("not_restored", "all"),
            ("recipe", "digits"),
            ("batches", 3),
            ("backend", None),
            ("other", 1),
        ],
    )
    def test_a_manifest_with_a_damaged_field_is_refused(self, write, field, value):
        path = write("torch").path
        self.rewrite(path, lambda m: m.update(manifest=json.dumps(json.loads(m["manifest"]) | {field: value})))
        with pytest.raises(RecordError) as caught:
            Record.read(path)
        assert str(caught.value).startswith(f"{path}: the manifest is damaged: ")
        assert "\n" not in str(caught.value)

    def test_a_record_that_cannot_be_written_leaves_nothing(self, write, tmp_path):
        (tmp_path / "torch-float64.safetensors").mkdir()
        with pytest.raises(RecordError, match="Is a directory; nothing was left there"):
            write("torch")
        assert len(list(tmp_path.iterdir())) == 1


class TestEqualRecords:
    @pytest.mark.parametrize("backends", [TWO, THREE])
    @pytest.mark.parametrize(
        ("modes", "dtype", "level"),
        [(ALL, "float64", "L1"), (ALL, "float32", "L2"), (("grad",), "float64", "L1"), (("exact",), "float32", "L0")],
    )
    def test_they_pass_at_every_level_and_all_pairs_are_compared(self, write, backends, modes, dtype, level):
        compared = compare([write(b, modes=modes, dtype=dtype) for b in backends])
        assert compared.passed
        assert (compared.level, compared.backends, compared.modes) == (level, backends, modes)
        assert (compared.variant, compared.dtype) == ("tiny", dtype)
        pairs = [(a, b) for i, a in enumerate(backends) for b in backends[i + 1 :]]
        expected = [(name, pair) for name in expected_arrays(modes) for pair in pairs]
        assert [(str(d.tensor), d.pair) for d in compared.differences] == expected
        assert {(d.verdict, d.distance, d.error, d.ratio) for d in compared.differences} == {("same", 0, 0, 0)}
        assert compared.first is None
        assert compared.odd_one_out is None

    def test_modes_that_not_all_records_have_are_left_out(self, write):
        compared = compare([write("torch", modes=ALL), write("flax", modes=("eval", "grad"))])
        assert compared.passed
        assert compared.modes == ("eval", "grad")

    def test_the_response_comes_from_whichever_record_carries_one(self, write):
        compared = compare([write("torch", response={}), write("flax", {CONV: put(1e-12)})])
        assert compared.passed
        with pytest.raises(RecordError, match="no record carries a one-ulp response"):
            compare([write("torch", response={}), write("flax", response={})])


def no_values(array):
    return np.zeros((0,))


# Each of them would pass where only differences of common values are asked for.
ACCIDENTS = {
    "NaN": (put(nan, 3), "has values that are NaN or infinite"),
    "infinite": (put(-inf, 3), "has values that are NaN or infinite"),
    "zeros": (np.zeros_like, "is 100% zero, too empty to compare"),
    "half precision": (lambda a: a.astype(np.float16), "is float16; float64 was asked for"),
    "single precision": (lambda a: a.astype(np.float32), "is float32; float64 was asked for"),
    "missing": (None, "is missing"),
    "batch of one": (lambda a: a[:1], "has shape (1, 8, 8, 4); expected (2, 8, 8, 4)"),
    "channels first": (lambda a: a.transpose(0, 3, 1, 2), "has shape (2, 4, 8, 8); expected (2, 8, 8, 4)"),
    "no values": (no_values, "has shape (0,); expected (2, 8, 8, 4)"),
}


class TestAccidents:
    @pytest.mark.parametrize("backend", THREE)
    @pytest.mark.parametrize(("change", "what"), ACCIDENTS.values(), ids=ACCIDENTS)
    def test_an_unfit_array_in_any_record_fails_and_names_it(self, write, backend, change, what):
        compared = compare([write(b, {CONV: change} if b == backend else None) for b in THREE])
        assert not compared.passed
        assert [(p.backend, str(p.tensor), p.what) for p in compared.problems] == [(backend, CONV, what)]
        assert compared.odd_one_out == backend
        # The others are still compared there.
        assert {d.pair for d in compared.differences if str(d.tensor) == CONV} == {
            tuple(b for b in THREE if b != backend),
        }

    @pytest.mark.parametrize(("change", "what"), ACCIDENTS.values(), ids=ACCIDENTS)
    @pytest.mark.parametrize("mode", ["exact", "eval"])
    def test_an_unfit_array_in_every_record_fails(self, write, mode, change, what):
        compared = compare([write(b, {CONV.replace("eval", mode): change}, modes=(mode,)) for b in TWO])
        assert not compared.passed
        assert [(p.backend, p.what) for p in compared.problems] == [(b, what) for b in TWO]
        assert compared.odd_one_out is None

    @pytest.mark.parametrize(
        "tensor", ["eval/loss", "train/stat/stem.norm.mean", "eval/grad/stem.conv.kernel", "train/grad/input"]
    )
    @pytest.mark.parametrize("change", [put(nan), None, lambda a: a[None]], ids=["NaN", "missing", "shape"])
    def test_every_kind_of_array_is_examined(self, write, tensor, change):
        compared = compare([write("torch", modes=ALL), write("flax", {tensor: change}, modes=ALL)])
        assert not compared.passed
        assert [(p.backend, str(p.tensor)) for p in compared.problems] == [("flax", tensor)]

    # 512 values: 486 are 94.9 %, 487 are 95.1 %.
    @pytest.mark.parametrize(("zeros", "passed"), [(486, True), (487, False)])
    def test_more_than_95_percent_zeros_are_too_many(self, write, zeros, passed):
        def thin(array):
            return np.where(np.arange(array.size).reshape(array.shape) < zeros, 0, 1.0)

        assert prod(expected_arrays(("eval",))[CONV]) == 512
        assert compare([write(b, {CONV: thin}) for b in TWO]).passed == passed

    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two_records_are_refused(self, write, count):
        with pytest.raises(RecordError, match=f"{count} record given; a comparison needs at least two"):
            compare([write(b) for b in TWO[:count]])

    def test_a_record_compared_with_itself_is_refused(self, write):
        made = write("torch")
        with pytest.raises(RecordError, match="is given twice"):
            compare([made, Record.read(made.path)])

    @pytest.mark.parametrize("modes", [("train",), ("exact",)])
    def test_records_without_a_mode_in_common_are_refused(self, write, modes):
        with pytest.raises(RecordError, match="nothing was compared"):
            compare([write("torch", modes=("eval",)), write("flax", modes=modes)])

    def test_an_empty_comparison_does_not_pass(self):
        empty = {
            "level": "L1",
            "variant": "tiny",
            "subject": {},
            "dtype": "float64",
            "backends": TWO,
            "modes": ("eval",),
        }
        assert not Comparison(**empty, differences=()).passed

    def test_weights_that_did_not_come_back_bitwise_fail(self, write):
        compared = compare([write("torch"), write("flax", not_restored=("stem.conv.kernel",))])
        assert not compared.passed
        assert [(p.backend, str(p.tensor)) for p in compared.problems] == [("flax", "stem.conv.kernel")]


class TestIdentity:
    """Level L1."""

    TENSORS = (
        CONV,
        "eval/tap/head.fc",
        "train/tap/stem.norm",
        "train/stat/stem.norm.mean",
        "eval/grad/head.fc.bias",
        "train/grad/stages.1.blocks.0.shortcut.norm.scale",
        "train/grad/input",
    )

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("tensor", TENSORS)
    def test_the_limit_of_eight_responses_is_sharp(self, write, tensor, sign):
        response = 1e-12 * record.norm(arrays(ALL)[tensor])
        limit = 8 * response
        reference = write("torch", modes=ALL)
        for distance, verdict in ((limit, "same"), (np.nextafter(limit, 1), "different")):
            compared = compare([reference, write("flax", {tensor: put(sign * distance)}, modes=ALL)])
            found = next(d for d in compared.differences if str(d.tensor) == tensor)
            assert (found.verdict, found.distance, found.response) == (verdict, distance, response)
            assert compared.passed == (verdict == "same")
            assert (compared.first is None) == compared.passed
            assert found.ratio == pytest.approx(8)
            assert found.error == pytest.approx(8e-12)

    def test_the_loss_is_held_to_its_response_too(self, write):
        reference = write("torch")
        relative = {1 + 7.9e-12: True, 1 + 8.1e-12: False}
        for factor, passed in relative.items():
            moved = write("flax", {"eval/loss": lambda a, factor=factor: a * factor})
            assert compare([reference, moved]).passed == passed

    @pytest.mark.parametrize("response", [None, 0.0, 1e-40])
    def test_below_four_roundings_the_floor_holds(self, write, response):
        values = arrays()
        given = responses(values, 1e-12)
        del given[CONV]
        if response is not None:
            given[CONV] = response
        floor = 4 * 2.0**-53 * record.norm(values[CONV])
        reference = write("torch", response=given)
        for distance, passed in ((8 * floor, True), (np.nextafter(8 * floor, 1), False)):
            compared = compare([reference, write("flax", {CONV: put(distance)})])
            assert compared.passed == passed
            assert next(d for d in compared.differences if str(d.tensor) == CONV).response == floor

    @pytest.mark.parametrize(
        ("tensor", "terms"),
        [
            ("eval/grad/stem.conv.bias", 128),  # 2 images of 8x8
            ("train/grad/stages.1.blocks.0.norm2.bias", 32),  # 2 images of 4x4: the floor of four roundings is as large
            ("eval/grad/head.fc.bias", 32),  # 2 images: the floor of four roundings is the larger
            ("eval/grad/stem.conv.kernel", 32),  # no plain sum
            ("eval/grad/stem.norm.scale", 32),
            ("eval/tap/stem.conv", 32),
        ],
    )
    def test_a_gradient_that_is_a_sum_may_be_off_by_one_rounding_a_term(self, write, tensor, terms):
        size = record.norm(arrays(ALL)[tensor])
        reference = write("torch", modes=ALL, response=responses(arrays(ALL), 1e-18))
        for factor, passed in ((0.99, True), (1.01, False)):
            moved = write("flax", {tensor: put(factor * terms * UNIT["float64"] * size)}, modes=ALL)
            assert compare([reference, moved]).passed == passed

    @pytest.mark.parametrize("distance", [0.0, 1e-12])
    def test_a_response_above_1e_9_decides_nothing_and_does_not_pass(self, write, distance):
        values = arrays()
        at = 1e-9 * record.norm(values[CONV])
        for response, verdict in ((at, "same"), (np.nextafter(at, 1), "undecided"), (inf, "undecided")):
            reference = write("torch", response=responses(values, 1e-12) | {CONV: response})
            compared = compare([reference, write("flax", {CONV: put(distance)})])
            assert verdicts(compared, CONV) == {verdict}
            assert compared.passed == (verdict == "same")
            assert compared.first is None

    def test_a_perturbed_pass_that_is_not_finite_is_a_problem_of_the_reference(self, write):
        reference = write("torch", response=responses(arrays(), 1e-12) | {CONV: nan})
        compared = compare([reference, write("flax")])
        assert not compared.passed
        assert [(p.backend, str(p.tensor)) for p in compared.problems] == [("torch", CONV)]
        assert "NaN or infinite where weights and images moved by an ulp" in compared.problems[0].what

    @pytest.mark.parametrize("response", [1e-3, nan])
    def test_a_large_or_lost_response_does_not_excuse_a_difference(self, write, response):
        reference = write("torch", response=responses(arrays(), 1e-12) | {CONV: response})
        compared = compare([reference, write("flax", {CONV: put(1.0)})])
        assert verdicts(compared, CONV) == {"different"}
        assert not compared.passed

    def test_values_too_large_for_a_norm_decide_nothing(self, write):
        huge = {CONV: lambda a: a * 1e200}
        compared = compare([write("torch", huge), write("flax", {CONV: lambda a: a * 1.01e200})])
        assert not compared.passed

    # The gradient of a convolution's bias before a batch norm is zero but for rounding: its response is as large as
    # itself, and what counts is how it compares with the gradient of the kernel beside it.
    @pytest.mark.parametrize(
        ("kernel", "distance", "verdict"),
        [(1.0, 2e-16, "same"), (1.0, 1e-12, "different"), (1e-12, 2e-16, "undecided")],
    )
    def test_a_gradient_that_is_zero_but_for_rounding_is_judged_by_its_layer(self, write, kernel, distance, verdict):
        bias, weight = (f"train/grad/stages.0.blocks.0.conv1.{role}" for role in ("bias", "kernel"))
        values = arrays(ALL)
        tiny = {bias: lambda a: a * 1e-16, weight: lambda a: a * kernel}
        given = responses(values, 1e-12) | {bias: 1e-16, weight: 1e-25}
        reference = write("torch", tiny, modes=ALL, response=given)
        other = write("flax", tiny | {bias: lambda a: put(distance)(a * 1e-16)}, modes=ALL)
        compared = compare([reference, other])
        assert verdicts(compared, bias) == {verdict}
        assert compared.passed == (verdict == "same")

    def test_all_pairs_are_held_to_the_limit_not_a_star(self, write):
        # Each differs from the reference by six responses, and they from each other by twelve.
        step = 6e-12 * record.norm(arrays()[CONV])
        compared = compare(
            [write("torch"), write("keras:tensorflow", {CONV: put(step)}), write("flax", {CONV: put(-step)})]
        )
        found = {d.pair: d.verdict for d in compared.differences if str(d.tensor) == CONV}
        assert found == {THREE[:2]: "same", ("torch", "flax"): "same", THREE[1:]: "different"}
        assert not compared.passed
        assert compared.odd_one_out is None


class TestOrdersOfTheBatch:
    """The order response, of every backend."""

    @pytest.mark.parametrize(("of_torch", "of_flax"), [(5, 0), (0, 5), (2, 3)])
    @pytest.mark.parametrize("modes", [ALL, STEPS])
    def test_what_another_order_changes_in_either_backend_widens_the_limit(self, write, modes, of_torch, of_flax):
        tensor = "train/grad/stem.conv.kernel" if modes is ALL else "step01/velocity/stem.conv.kernel"
        response = 1e-12 * record.norm(arrays(modes)[tensor])
        reference = write("torch", modes=modes, order_response={tensor: of_torch * response})
        for factor, verdict in ((0.999, "same"), (1.001, "different")):
            change = {tensor: put(factor * 8 * 6 * response)}
            compared = compare(
                [reference, write("flax", change, modes=modes, order_response={tensor: of_flax * response})]
            )
            assert verdicts(compared, tensor) == {verdict}
            assert next(d for d in compared.differences if str(d.tensor) == tensor).response == pytest.approx(
                6 * response
            )
            assert not compared.order_dependent

    def test_of_a_third_backend_it_excuses_nothing(self, write):
        response = 1e-12 * record.norm(arrays()[CONV])
        third = write("keras:tensorflow", order_response={CONV: 100 * response})
        compared = compare([write("torch"), third, write("flax", {CONV: put(9 * response)})])
        found = {d.pair: d.verdict for d in compared.differences if str(d.tensor) == CONV}
        assert found == {THREE[:2]: "same", THREE[1:]: "same", ("torch", "flax"): "different"}

    @pytest.mark.parametrize("backend", THREE)
    @pytest.mark.parametrize("tensor", ["train/tap/stem.norm", "eval/grad/head.fc.kernel", "train/stat/stem.norm.var"])
    def test_beyond_a_thousand_responses_the_backend_itself_is_at_fault(self, write, backend, tensor):
        response = 1e-12 * record.norm(arrays(ALL)[tensor])
        for factor, passed in ((999.0, True), (1001.0, False)):
            changes = {tensor: factor * response, "train/grad/input": 1e-3 * factor}
            compared = compare([write(b, modes=ALL, order_response=changes if b == backend else {}) for b in THREE])
            if passed:
                assert not any(str(found.tensor) == tensor for found in compared.order_dependent)
                continue
            assert not compared.passed
            (found,) = compared.order_dependent
            assert (found.backend, str(found.tensor)) == (backend, tensor)
            assert found.ratio == pytest.approx(1001)
            assert found.error == pytest.approx(1001e-12)
            assert compared.odd_one_out == backend

    def test_what_is_beyond_that_excuses_no_difference(self, write):
        response = 1e-12 * record.norm(arrays()[CONV])
        moved = write("flax", {CONV: put(9 * response)}, order_response={CONV: 1e6 * response})
        compared = compare([write("torch"), write("keras:tensorflow"), moved])
        assert verdicts(compared, CONV) == {"same", "different"}
        assert str(compared.first.tensor) == CONV
        assert compared.odd_one_out == "flax"

    @pytest.mark.parametrize("change", [nan, inf])
    def test_an_order_whose_result_is_not_finite_is_a_fault(self, write, change):
        compared = compare([write("torch"), write("flax", order_response={CONV: change})])
        assert not compared.passed
        assert [(f.backend, str(f.tensor)) for f in compared.order_dependent] == [("flax", CONV)]

    def test_integers_come_out_the_same_in_any_order(self, write):
        exact = {"modes": ("exact",), "dtype": "float32", "response": {}}
        tensor = "exact/tap/stem.conv"
        assert compare([write("torch", **exact), write("flax", **exact, order_response={tensor: 0.0})]).passed
        compared = compare([write("torch", **exact), write("flax", **exact, order_response={tensor: 1e-9})])
        assert not compared.passed
        assert compared.odd_one_out == "flax"

    def test_in_float32_a_flip_in_another_order_is_no_fault(self, write):
        values = arrays(ALL, "float32")
        tensor = "train/grad/stem.conv.kernel"
        quiet = {"modes": ALL, "dtype": "float32", "response": responses(values, 1e-7)}
        flipped = {tensor: 0.01 * record.norm(values[tensor])}
        compared = compare([write("torch", **quiet), write("flax", **quiet, order_response=flipped)])
        assert compared.passed
        assert verdicts(compared, tensor) == {"reported"}
        # What is no gradient does not jump.
        tap = {"train/tap/stem.conv": 0.01 * record.norm(values["train/tap/stem.conv"])}
        compared = compare([write("torch", **quiet), write("flax", **quiet, order_response=tap)])
        assert [str(found.tensor) for found in compared.order_dependent] == ["train/tap/stem.conv"]

    def test_a_single_image_has_no_order_and_is_undecided_as_far_as_one_could_explain_it(self, write):
        alone = {"shape": (1, 8, 8, 3), "orders": 0}
        response = 1e-12 * record.norm(arrays()[CONV])
        most = RESPONSE_FACTOR * (1 + 2 * ORDER_LIMIT)
        for distance, verdict in (
            (7.9, "same"),
            (1.01 * most, "different"),
            (8.1, "undecided"),
            (0.99 * most, "undecided"),
        ):
            single = {name: lambda a: a[:1] for name in arrays() if "/tap/" in name}
            first = write("torch", single, **alone)
            change = {CONV: lambda a, d=distance: put(d * response)(a[:1])}
            compared = compare([first, write("flax", single | change, **alone)])
            assert verdicts(compared, CONV) == {verdict}
            assert compared.passed == (verdict == "same")
            assert (compared.first is None) == (verdict != "different")
        shown = io.StringIO()
        Console(file=shown, width=200).print(console.comparison(compared))
        assert "use a batch of 2" in shown.getvalue()

    @pytest.mark.parametrize(("images", "expected"), [(1, 0), (2, 1), (3, 3), (5, 3)])
    def test_orders_are_other_orders_and_all_different(self, images, expected):
        found = [tuple(order) for order in orders(images)]
        assert len(set(found)) == len(found) == expected
        assert tuple(range(images)) not in found
        assert all(sorted(order) == list(range(images)) for order in found)


class TestPrecision:
    """Level L2."""

    @pytest.mark.parametrize("relative", [1e-6, 1e-3])
    def test_outputs_in_eval_mode_are_gated_however_large_their_response(self, write, relative):
        response = responses(arrays(dtype="float32"), relative)
        limit = 8 * response[CONV]
        for factor, passed in ((0.999, True), (1.001, False)):
            records = [
                write("torch", dtype="float32", response=response),
                write("flax", {CONV: put(factor * limit)}, dtype="float32"),
            ]
            compared = compare(records)
            assert compared.passed == passed
            assert verdicts(compared, CONV) == {"same" if passed else "different"}

    def test_the_floor_is_that_of_float32(self, write):
        floor = 4 * 2.0**-24 * record.norm(arrays(dtype="float32")[CONV])
        reference = write("torch", dtype="float32", response={"eval/loss": 1e-6})
        for factor, passed in ((0.999, True), (1.001, False)):
            moved = write("flax", {CONV: put(8 * floor * factor)}, dtype="float32")
            assert compare([reference, moved]).passed == passed

    @pytest.mark.parametrize(
        "tensor", ["train/tap/stem.conv", "train/stat/stem.norm.var", "eval/grad/head.fc.kernel", "train/grad/input"]
    )
    @pytest.mark.parametrize(
        ("relative", "error", "verdict"),
        [
            (0.9e-4, 7e-4, "same"),
            (0.9e-4, 1e-3, "different"),
            (1.1e-4, 7e-4, "reported"),
            (1.1e-4, 0.5, "reported"),
        ],
    )
    def test_gradients_and_training_values_are_gated_below_1e_4_and_reported_above(
        self, write, tensor, relative, error, verdict
    ):
        values = arrays(ALL, "float32")
        response = responses(values, 1e-6) | {tensor: relative * record.norm(values[tensor])}
        records = [
            write("torch", modes=ALL, dtype="float32", response=response),
            write("flax", {tensor: put(error * record.norm(values[tensor]))}, modes=ALL, dtype="float32"),
        ]
        compared = compare(records)
        assert verdicts(compared, tensor) == {verdict}
        assert compared.passed == (verdict != "different")

    @pytest.mark.parametrize(
        ("tensor", "verdict"),
        [
            ("train/grad/stem.conv.kernel", "reported"),
            ("train/grad/input", "reported"),
            ("eval/grad/stem.conv.kernel", "different"),  # another pass
            ("train/tap/stem.conv", "different"),  # values do not jump where a unit flips
            ("train/stat/stem.norm.var", "different"),
            ("eval/tap/stem.conv", "different"),
        ],
    )
    def test_where_one_gradient_shows_a_flip_no_other_of_its_pass_is_gated(self, write, tensor, verdict):
        values = arrays(ALL, "float32")
        flip = {"train/grad/head.fc.kernel": 1.1e-4 * record.norm(values["train/grad/head.fc.kernel"])}
        for response, expected in ((flip, verdict), ({}, "different")):
            reference = write("torch", modes=ALL, dtype="float32", response=responses(values, 1e-6) | response)
            moved = write("flax", {tensor: put(1e-2 * record.norm(values[tensor]))}, modes=ALL, dtype="float32")
            compared = compare([reference, moved])
            assert verdicts(compared, tensor) == {expected}
            assert compared.passed == (expected == "reported")

    @pytest.mark.parametrize(
        ("tensor", "verdict"),
        [
            ("train/grad/stem.conv.kernel", "reported"),
            ("train/grad/input", "reported"),
            ("eval/grad/stem.conv.kernel", "different"),  # another pass
            ("train/stat/stem.norm.var", "different"),  # no gradient
        ],
    )
    @pytest.mark.parametrize("switched", [True, False])
    def test_where_one_switched_a_unit_off_no_gradient_of_that_pass_is_gated(self, write, tensor, verdict, switched):
        values = arrays(ALL, "float32")
        reference = write("torch", modes=ALL, dtype="float32", response=responses(values, 1e-6))
        tap = {"train/tap/stem.conv": put(1e-9) if switched else lambda a: a}  # within rounding either way
        moved = {tensor: put(1e-2 * record.norm(values[tensor]))}
        compared = compare([reference, write("flax", tap | moved, modes=ALL, dtype="float32")])
        assert verdicts(compared, "train/tap/stem.conv") == {"same"}
        assert verdicts(compared, tensor) == {verdict if switched else "different"}

    def test_in_float64_a_unit_that_one_switched_off_is_no_excuse(self, write):
        tensor = "train/grad/stem.conv.kernel"
        moved = {"train/tap/stem.conv": put(1e-20), tensor: put(1e-2)}
        compared = compare([write("torch", modes=ALL), write("flax", moved, modes=ALL)])
        assert verdicts(compared, tensor) == {"different"}

    def test_a_comparison_in_which_everything_is_only_reported_does_not_pass(self, write):
        response = responses(arrays(("grad",), "float32"), 1e-2)
        compared = compare([write(b, modes=("grad",), dtype="float32", response=response) for b in TWO])
        assert {d.verdict for d in compared.differences} == {"reported"}
        assert not compared.passed

    @pytest.mark.parametrize("response", [inf, nan])
    def test_an_infinite_response_lets_nothing_pass(self, write, response):
        given = responses(arrays(dtype="float32"), 1e-6) | {CONV: response}
        records = [
            write("torch", dtype="float32", response=given),
            write("flax", {CONV: put(1e-3)}, dtype="float32"),
        ]
        assert not compare(records).passed

    # In units of some small error: each backend's own, and which of them are too far above the lower median.
    @pytest.mark.parametrize(
        ("errors", "imprecise"),
        [
            ((1, 1), []),
            ((1, 4.9), []),
            ((1, 5.1), [1]),
            ((5.1, 1), [0]),
            ((1, 1, 4.9), []),
            ((1, 1, 5.1), [2]),
            ((1, 5.1, 1), [1]),
            ((1, 3, 14), []),
            ((1, 100, 100), []),
            ((0, 0, 1), [2]),
            ((1, 1, 2, 9.9, 9.9), []),
            ((1, 1, 2, 9.9, 10.1), [4]),
            ((1, 1, 1, 6, 7), [3, 4]),
        ],
    )
    def test_own_error_is_held_to_five_times_the_lower_median(self, write, errors, imprecise):
        backends = FIVE[: len(errors)]
        norm = record.norm(arrays()[CONV])
        response = responses(arrays(dtype="float32"), 1.0)
        records = [
            write(b, {CONV: put(1e-4 * error * norm)}, dtype="float32", response=response)
            for b, error in zip(backends, errors, strict=True)
        ]
        compared = compare(records, truth=write("torch", name="truth"))
        assert [p.backend for p in compared.precision if not p.passed] == [backends[i] for i in imprecise]
        assert compared.passed == (not imprecise)
        assert compared.odd_one_out == (backends[imprecise[0]] if len(imprecise) == 1 else None)
        assert compare(records).precision == ()
        there = [p for p in compared.precision if str(p.tensor) == CONV]
        assert [p.error for p in there] == pytest.approx([1e-4 * error for error in errors], rel=1e-6)
        assert len(compared.precision) == len(SPEC.layers) * len(errors)

    @pytest.mark.parametrize(("error", "passed"), [(9.9, True), (10.1, False)])
    def test_what_rounding_the_weights_does_is_no_lack_of_precision(self, write, error, passed):
        # The median of few values may be small by luck; the network's own response is twice as large here.
        norm = record.norm(arrays()[CONV])
        response = responses(arrays(dtype="float32"), 2e-6)
        records = [
            write(b, {CONV: put(1e-6 * own * norm)}, dtype="float32", response=response)
            for b, own in zip(FIVE, (1, 1, error), strict=False)
        ]
        compared = compare(records, truth=write("torch", name="truth"))
        assert compared.passed == passed
        assert [p.backend for p in compared.precision if not p.passed] == ([] if passed else [FIVE[2]])

    def test_errors_below_a_few_roundings_are_no_lack_of_precision(self, write):
        norm = record.norm(arrays()[CONV])
        response = responses(arrays(dtype="float32"), UNIT["float32"])
        for error, passed in ((4.9, True), (5.1, False)):
            records = [
                write("torch", dtype="float32", response=response),
                write("flax", {CONV: put(error * UNIT["float32"] * norm)}, dtype="float32"),
            ]
            assert compare(records, truth=write("torch", name="truth")).passed == passed

    @pytest.mark.parametrize("change", [put(nan), None, np.zeros_like, lambda a: a[:1], lambda a: a.astype("float32")])
    def test_a_truth_that_is_unfit_fails_and_is_not_skipped(self, write, change):
        records = [write(b, dtype="float32") for b in TWO]
        compared = compare(records, truth=write("torch", {CONV: change}, name="truth"))
        assert not compared.passed
        assert [(p.backend, str(p.tensor)) for p in compared.problems] == [("torch in float64", CONV)]

    @pytest.mark.parametrize("other", [{"inputs": "0"}, {"weights": "0"}])
    def test_a_truth_of_another_input_or_other_weights_is_refused(self, write, other):
        records = [write(b, dtype="float32") for b in TWO]
        with pytest.raises(RecordError, match=f"different {next(iter(other))}"):
            compare(records, truth=write("torch", name="truth", **other))


class TestColumnsThatRoundInside:
    """Keras on jax and torch: float32 inside a float64 network."""

    def test_they_are_held_to_the_float32_response_and_the_others_to_their_own(self, write):
        norm = record.norm(arrays()[CONV])
        float32 = write("torch", dtype="float32")
        for error, passed in ((7e-6, True), (9e-6, False)):
            records = [write("torch"), write("flax"), write("keras:jax", {CONV: put(error * norm)})]
            compared = compare(records, float32=float32)
            levels = {d.pair: d.level for d in compared.differences}
            assert levels == {
                ("torch", "flax"): "L1",
                ("torch", "keras:jax"): "L2",
                ("flax", "keras:jax"): "L2",
            }
            assert compared.passed == passed
            assert compared.odd_one_out == (None if passed else "keras:jax")
        # Such a column excuses no other, and cannot tell which of two others is wrong.
        strict = compare([write("torch"), write("keras:jax"), write("flax", {CONV: put(7e-6 * norm)})], float32=float32)
        assert strict.first.pair == ("torch", "flax")
        assert strict.odd_one_out is None

    def test_without_a_float32_record_they_cannot_be_judged(self, write):
        with pytest.raises(RecordError, match=r"keras:jax, keras:torch rounds to float32 .* give a float32 record"):
            compare([write(b) for b in ("torch", "keras:torch", "keras:jax")])

    def test_a_float32_record_of_another_network_is_refused(self, write):
        other = write("torch", dtype="float32", subject=architectures.to_dict(SPEC.replace(bn_eps=1e-3)))
        with pytest.raises(RecordError, match=r"different networks: bn_eps is 1e-05 and 0.001"):
            compare([write("torch"), write("keras:jax")], float32=other)

    def test_the_layers_where_precision_is_lost_are_named(self, write):
        def full(array):
            return array + np.float64(1e-12)

        taps = {name: full for name in arrays(("eval", "train")) if "/tap/" in name}
        spared = taps | {"eval/tap/stem.norm": None, "train/tap/head.pool": lambda a: a}
        made = write("keras:jax", spared, modes=("eval", "train"))
        assert rounded_to_float32(made) == ("head.pool",)
        assert rounded_to_float32(write("torch", taps, modes=("eval", "train"))) == ()
        # Of layers that only pick values it says nothing: what they round was rounded before.
        exact = taps | {"eval/tap/stem.relu": lambda a: a, "eval/tap/stem.norm": lambda a: a}
        made = write("keras:jax", exact, modes=("eval", "train"))
        assert rounded_to_float32(made) == ("stem.norm",)

    def test_a_comparison_names_them_for_these_columns_only(self, write):
        compared = compare([write("torch"), write("keras:torch")], float32=write("torch", dtype="float32"))
        rounding = tuple(layer.path for layer in SPEC.layers if not layer.exact)
        assert compared.float32_inside == {"keras:torch": rounding}


class TestExact:
    """Level L0."""

    @pytest.mark.parametrize("ulps", [1, -1])
    def test_one_ulp_is_a_difference(self, write, ulps):
        tensor = "exact/tap/head.fc"
        modes = ("exact",)

        def moved(array):
            return put(np.nextafter(array.flat[3], array.dtype.type(ulps * inf)), 3)(array)

        same = [write(b, modes=modes, dtype="float32", response={}) for b in THREE]
        assert compare(same).passed
        compared = compare([*same[:2], write("flax", {tensor: moved}, modes=modes, dtype="float32", response={})])
        assert not compared.passed
        assert {str(d.tensor) for d in compared.differences if d.verdict == "different"} == {tensor}
        assert compared.odd_one_out == "flax"
        assert compared.first.ratio == inf

    def test_a_negative_zero_is_equal_to_a_positive_one(self, write):
        made = [
            write(b, {"exact/tap/head.fc": put(v)}, modes=("exact",)) for b, v in zip(TWO, (0.0, -0.0), strict=True)
        ]
        assert compare(made).passed


class TestBlame:
    @pytest.mark.parametrize("odd", FIVE)
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_among_five_the_odd_one_is_named_in_any_position(self, write, odd, dtype):
        records = [write(b, {CONV: put(1.0)} if b == odd else None, dtype=dtype) for b in FIVE]
        float32 = write("torch", name="own", dtype="float32") if dtype == "float64" else None
        compared = compare(records, float32=float32)
        assert not compared.passed
        assert compared.odd_one_out == odd

    @pytest.mark.parametrize("odd", THREE)
    @pytest.mark.parametrize("order", [THREE, THREE[::-1]])
    def test_among_three_the_odd_one_is_named_in_any_position(self, write, odd, order):
        # Below the first difference everything else differs too, and that blames nobody else.
        later = {"eval/tap/head.fc": put(2.0), "eval/tap/stages.1.blocks.0.add": put(3.0)}
        compared = compare([write(b, {CONV: put(1.0)} | later if b == odd else None) for b in order])
        assert compared.odd_one_out == odd
        assert str(compared.first.tensor) == CONV

    @pytest.mark.parametrize("odd", TWO)
    def test_between_two_nobody_can_tell(self, write, odd):
        compared = compare([write(b, {CONV: put(1.0)} if b == odd else None) for b in TWO])
        assert not compared.passed
        assert compared.odd_one_out is None

    def test_where_all_differ_nobody_is_blamed(self, write):
        compared = compare([write(b, {CONV: put(float(i))}) for i, b in enumerate(THREE)])
        assert compared.odd_one_out is None

    def test_nobody_is_blamed_where_the_others_cannot_be_seen_to_agree(self, write):
        loud = responses(arrays(), 1e-12) | {CONV: 1e-3}
        compared = compare([write("torch", {CONV: put(1.0)}, response=loud), write("keras:tensorflow"), write("flax")])
        found = {d.pair: d.verdict for d in compared.differences if str(d.tensor) == CONV}
        assert found == {THREE[:2]: "different", ("torch", "flax"): "different", THREE[1:]: "undecided"}
        assert compared.odd_one_out is None

    def test_two_defects_in_two_backends_blame_the_one_that_shows_first(self, write):
        compared = compare(
            [write("torch", {"eval/tap/head.fc": put(1.0)}), write("keras:tensorflow"), write("flax", {CONV: put(1.0)})]
        )
        assert compared.odd_one_out == "flax"


class TestOrder:
    FORWARD = ("stem.conv", "stages.0.blocks.0.norm2", "stages.1.blocks.0.shortcut.conv", "head.fc")

    @pytest.mark.parametrize("index", range(4))
    def test_forward_the_first_difference_is_the_earliest_layer(self, write, index):
        changes = {f"eval/tap/{path}": put(1.0) for path in self.FORWARD[index:]}
        compared = compare([write("torch"), write("flax", changes)])
        assert str(compared.first.tensor) == f"eval/tap/{self.FORWARD[index]}"
        assert compared.first.tensor.label == self.FORWARD[index]
        assert compared.first.tensor.section == "eval"

    BACKWARD = ("head.fc.kernel", "stages.1.blocks.0.conv2.kernel", "stages.0.blocks.0.norm1.scale", "input")

    @pytest.mark.parametrize("run", ["eval", "train"])
    @pytest.mark.parametrize("index", range(4))
    def test_backward_the_first_difference_is_the_latest_layer_and_the_input_comes_last(self, write, run, index):
        changes = {f"{run}/grad/{path}": put(1.0) for path in self.BACKWARD[index:]}
        compared = compare([write("torch", modes=("grad",)), write("flax", changes, modes=("grad",))])
        assert str(compared.first.tensor) == f"{run}/grad/{self.BACKWARD[index]}"
        assert (compared.first.tensor.mode, compared.first.tensor.section) == ("grad", f"grad, {run}")

    def test_a_difference_in_the_outputs_comes_before_those_in_gradients(self, write):
        changes = {name: put(1.0) for name in ("eval/grad/head.fc.kernel", "train/tap/head.fc", "eval/tap/head.fc")}
        compared = compare([write("torch", modes=ALL), write("flax", changes, modes=ALL)])
        assert str(compared.first.tensor) == "eval/tap/head.fc"


def of_step(number, kind, name="stages.0.blocks.0.conv1.kernel"):
    return f"step{number:02d}/{kind}/{name}"


class TestSteps:
    """Mode steps."""

    # As their values come about.
    ORDER = (
        "step01/loss",
        of_step(1, "stat", "stem.norm.mean"),
        of_step(1, "stat", "stages.1.blocks.0.norm2.var"),
        of_step(1, "velocity", "head.fc.kernel"),
        of_step(1, "velocity", "stem.conv.kernel"),
        of_step(1, "param", "head.fc.kernel"),
        of_step(1, "param", "stem.conv.kernel"),
        "step02/loss",
        of_step(3, "velocity", "stem.conv.kernel"),
    )

    @pytest.mark.parametrize("index", range(len(ORDER)))
    def test_the_first_difference_is_the_first_step_and_there_the_first_value(self, write, index):
        changes = {name: lambda a: a + 1.0 for name in self.ORDER[index:]}
        compared = compare([write("torch", modes=STEPS), write("keras:tensorflow", modes=STEPS),
                            write("flax", changes, modes=STEPS)])  # fmt: skip
        first = compared.first
        run, _, rest = self.ORDER[index].partition("/")
        kind, _, name = rest.partition("/")
        assert str(first.tensor) == self.ORDER[index]
        assert (first.tensor.step, first.tensor.section, first.tensor.mode) == (
            int(run[-2:]),
            f"steps, {kind}",
            "steps",
        )
        assert first.tensor.label == (name or "loss")
        assert compared.odd_one_out == "flax"

    def test_steps_come_after_the_other_modes(self, write):
        changes = {name: lambda a: a + 1.0 for name in ("step01/loss", "train/grad/input")}
        modes = (*ALL, "steps")
        compared = compare([write("torch", modes=modes), write("flax", changes, modes=modes)])
        assert compared.first.tensor == named("train/grad/input")

    @pytest.mark.parametrize("tensor", ORDER)
    def test_the_limit_of_eight_responses_holds_for_every_array_of_every_step(self, write, tensor):
        reference = write("torch", modes=STEPS)
        for factor, verdict in ((7.9e-12, "same"), (8.1e-12, "different")):
            moved = write("flax", {tensor: lambda a, factor=factor: a * (1 + factor)}, modes=STEPS)
            compared = compare([reference, moved])
            assert verdicts(compared, tensor) == {verdict}
            assert compared.passed == (verdict == "same")

    @pytest.mark.parametrize(("change", "what"), ACCIDENTS.values(), ids=ACCIDENTS)
    def test_an_unfit_array_of_any_step_fails(self, write, change, what):
        tensor = of_step(2, "velocity")
        compared = compare([write("torch", modes=STEPS), write("flax", {tensor: change}, modes=STEPS)])
        assert not compared.passed
        (problem,) = compared.problems
        assert (problem.backend, str(problem.tensor)) == ("flax", tensor)
        assert problem.what.split(" (")[0] == what.split(" (")[0]

    def test_a_velocity_that_is_zero_but_for_rounding_is_judged_by_its_layer(self, write):
        bias, kernel = of_step(2, "velocity", "stem.conv.bias"), of_step(2, "velocity", "stem.conv.kernel")
        given = responses(arrays(STEPS), 1e-12) | {bias: 1e-16}
        for size, verdict in ((1.0, "same"), (1e-12, "undecided")):
            tiny = {bias: lambda a: a * 1e-16, kernel: lambda a, size=size: a * size}
            compared = compare([write("torch", tiny, modes=STEPS, response=given), write("flax", tiny, modes=STEPS)])
            assert verdicts(compared, bias) == {verdict}

    @pytest.mark.parametrize(
        ("optimizer", "kind", "terms"),
        [("sgd", "velocity", 128), ("sgd", "param", 32), ("adamw", "moment1", 128), ("adamw", "moment2", 256)],
    )
    def test_what_comes_of_a_bias_gradient_may_be_off_by_one_rounding_a_term(
        self, write, monkeypatch, optimizer, kind, terms
    ):
        monkeypatch.setitem(globals(), "RECIPE", RECIPE.replace(optimizer=optimizer))
        tensor = of_step(2, kind, "stem.conv.bias")  # over 2 images of 8x8
        size = record.norm(arrays(STEPS)[tensor])
        reference = write("torch", modes=STEPS, response=responses(arrays(STEPS), 1e-18))
        for factor, passed in ((0.99, True), (1.01, False)):
            moved = write("flax", {tensor: put(factor * terms * UNIT["float64"] * size)}, modes=STEPS)
            assert compare([reference, moved]).passed == passed

    @pytest.mark.parametrize(
        ("tensor", "verdict"),
        [
            (of_step(1, "param"), "different"),
            ("step02/loss", "different"),  # the way forward of step 2 has not seen the flip
            (of_step(2, "stat", "stem.norm.mean"), "different"),
            (of_step(2, "velocity"), "reported"),
            (of_step(2, "param"), "reported"),
            ("step03/loss", "reported"),
        ],
    )
    def test_in_float32_nothing_is_gated_that_comes_after_a_flip(self, write, tensor, verdict):
        values = arrays(STEPS, "float32")
        flip = of_step(2, "velocity", "head.fc.kernel")
        flipped = {flip: 1.1e-4 * record.norm(values[flip])}
        for response, expected in ((flipped, verdict), ({}, "different")):
            given = responses(values, 1e-6) | response
            reference = write("torch", modes=STEPS, dtype="float32", response=given)
            moved = write("flax", {tensor: lambda a: a * 1.01}, modes=STEPS, dtype="float32")
            compared = compare([reference, moved])
            assert verdicts(compared, tensor) == {expected}
            assert compared.passed == (expected == "reported")

    def test_records_of_different_recipes_or_batches_are_refused(self, write):
        other = recipes.to_dict(RECIPE.replace(momentum=0.8, steps=4))
        for change, expected in (
            ({"recipe": other}, "different recipes: momentum is 0.9 and 0.8, steps is 3 and 4"),
            ({"batches": "91"}, "different batches: 90 and 91"),
        ):
            with pytest.raises(RecordError, match=expected):
                compare([write("torch", modes=STEPS), write("flax", modes=STEPS, **change)])
            # What both have beside is compared all the same.
            modes = ("eval", "steps")
            assert compare([write("torch"), write("flax", modes=modes, **change)]).modes == ("eval",)

    @pytest.mark.parametrize(
        ("changes", "kinds"),
        [
            ({}, ["loss", "stat", "velocity", "param"]),
            ({"momentum": 0.0}, ["loss", "stat", "param"]),
            ({"optimizer": "adamw", "ema_decay": 0.9}, ["loss", "stat", "moment1", "moment2", "param", "ema"]),
        ],
    )
    def test_what_is_kept_of_a_step_is_what_its_recipe_has(self, changes, kinds):
        expected = [a.name for a in arrays_of_steps(SPEC, RECIPE.replace(**changes), SHAPE)]
        assert list(dict.fromkeys(name.split("/")[1] for name in expected)) == kinds

    def test_large_arrays_are_sampled_but_for_the_last_step(self):
        spec = SPEC.replace(widths=(4, 32))
        kernel = "stages.1.blocks.0.conv2.kernel"  # 9216 values
        expected = {a.name: a.shape for a in arrays_of_steps(spec, RECIPE, SHAPE)}
        shapes = [expected[of_step(number, "param", kernel)] for number in (1, 2, 3)]
        assert shapes == [(steps.SAMPLE,), (steps.SAMPLE,), (3, 3, 32, 32)]
        assert expected[of_step(1, "param", "stages.1.blocks.0.conv1.kernel")] == (3, 3, 4, 32)

    @pytest.mark.parametrize("shape", [(4097,), (3, 3, 512, 512), (2048, 1000), (1, 1, 64, 256)])
    def test_a_sample_meets_every_part_of_an_array_and_every_channel(self, shape):
        array = np.arange(prod(shape), dtype=np.float64).reshape(shape)
        places = steps.sample(array)
        assert places.shape == (steps.SAMPLE,)
        starts = np.arange(steps.SAMPLE + 1) * prod(shape) // steps.SAMPLE
        assert (starts[:-1] <= places).all()
        assert (places < starts[1:]).all()
        if len(shape) > 1:
            seen = np.bincount((places % shape[-1]).astype(int), minlength=shape[-1])
            assert (seen > 0).all()
            assert seen.max() <= 2 * steps.SAMPLE / shape[-1]
        # The same values whatever the layout of memory.
        assert np.array_equal(steps.sample(np.asfortranarray(array)), places)


class TestComparable:
    @pytest.mark.parametrize(
        ("other", "expected"),
        [
            ({"subject": architectures.to_dict(SPEC.replace(bn_eps=1.1e-5))}, "networks: bn_eps is 1e-05 and 1.1e-05"),
            ({"subject": architectures.to_dict(SPEC.replace(classes=6))}, "different networks: classes is 5 and 6"),
            ({"weights": "9"}, "different weights: 5678 and 9"),
            ({"inputs": "9"}, "different inputs: 1234 and 9"),
            ({"dtype": "float32"}, "different dtypes: float64 and float32"),
        ],
        ids=["eps", "classes", "weights", "inputs", "dtype"],
    )
    def test_records_of_different_things_are_refused(self, write, other, expected):
        records = [write("torch"), write("keras:tensorflow"), write("flax", **other)]
        for given in (records, records[::2]):
            with pytest.raises(RecordError) as caught:
                compare(given)
            assert expected in str(caught.value)
            assert all(str(made.path) in str(caught.value) for made in (records[0], records[2]))
            assert "\n" not in str(caught.value)

    def test_an_unknown_backend_is_refused(self, write):
        with pytest.raises(RecordError, match="backend 'mxnet' is unknown; expected one of torch, keras:tensorflow"):
            compare([write("torch"), write("mxnet")])

    @pytest.mark.parametrize(
        ("names", "files_"),
        [
            (("old", "new", None), ("old-float64", "new-float64")),
            (("a/run", "b/run", None), ("{}/a/run-float64.safetensors", "{}/b/run-float64.safetensors")),
        ],
    )
    def test_records_of_one_backend_are_told_apart_by_their_files(self, write, tmp_path, names, files_):
        backends = ("torch", "torch", "flax")
        made = [
            write(b, {CONV: put(1.0)} if i == 0 else None, name=name)
            for i, (b, name) in enumerate(zip(backends, names, strict=True))
        ]
        compared = compare(made)
        assert compared.backends == (*(f"torch ({file.format(tmp_path)})" for file in files_), "flax")
        assert len({d.pair for d in compared.differences}) == 3
        assert compared.odd_one_out == compared.backends[0]


class TestFiles:
    def test_records_of_each_dtype_are_compared_with_one_another(self, write):
        made = [write(b, dtype=dtype) for dtype in ("float64", "float32") for b in THREE]
        compared = compare_files([r.path for r in made])
        assert [(c.dtype, c.level, c.passed) for c in compared] == [("float64", "L1", True), ("float32", "L2", True)]
        # The float64 record of the same weights and input is the truth for the float32 ones.
        assert compared[1].precision

    @pytest.mark.parametrize("other", [{"weights": "0"}, {"inputs": "0"}])
    def test_a_float64_record_of_other_weights_or_input_is_no_truth(self, write, other):
        made = [write(b, dtype="float32") for b in TWO]
        double = [write(b, **other) for b in TWO]
        compared = compare_files([r.path for r in (*double, *made)])
        assert [(c.passed, c.precision) for c in compared] == [(True, ()), (True, ())]

    def test_one_record_of_each_dtype_is_nothing_to_compare(self, write):
        with pytest.raises(RecordError, match="no two of the records have one dtype"):
            compare_files([write("torch").path, write("flax", dtype="float32").path])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Results as a check gives them, by name: each of its kind."""
    write = writer(tmp_path_factory.mktemp("outcomes"))
    case = Case(variant="tiny", spec=SPEC, size=(8, 8), modes=(*ALL, "steps"), recipe=RECIPE)

    def result(*comparisons, failures=None):
        return CheckResult(
            variant="tiny",
            title=case.title("random noise"),
            facts=case.facts,
            source="random noise",
            comparisons=comparisons,
            failures=failures or {},
            versions={"torch": {"torch": "2.0"}},
            seconds=1.25,
        )

    def moved(changes, dtype="float64", **reference):
        first = write("torch", modes=ALL, dtype=dtype, name="moved-torch", **reference)
        others = write("keras:tensorflow", modes=ALL, dtype=dtype, name="moved-keras")
        return [first, others, write("flax", changes, modes=ALL, dtype=dtype, name="moved-flax")]

    float32 = write("torch", modes=ALL, dtype="float32")
    undecided = responses(arrays(ALL), 1e-12) | {CONV: 1e-3}
    loud = responses(arrays(ALL, "float32"), 1e-2)
    gradients = {
        "train/grad/head.fc.kernel": put(1.0),
        "eval/grad/head.fc.kernel": put(np.float32(1e-3)),
    }
    # One array that flips makes all gradients of its pass reported: here those of the training pass alone.
    quiet = responses(arrays(ALL, "float32"), 1e-6)
    mixed = loud | {name: quiet[name] for name in quiet if name.startswith("eval/grad/")}
    return {
        "same": result(
            compare([write(b, modes=("exact",), dtype="float32", name=f"exact-{b}") for b in TWO]),
            compare([write(b, modes=ALL) for b in TWO]),
        ),
        "different": result(compare(moved({CONV: put(1.0), "train/grad/input": put(1.0)}))),
        "not finite": result(compare(moved({CONV: put(nan), "train/tap/head.fc": None}))),
        "not finite anywhere": result(compare(moved({CONV: lambda a: a * 1e250}))),
        "undecided": result(compare(moved({}, response=undecided))),
        "reported": result(compare(moved(gradients, "float32", response=mixed))),
        "no response": result(compare([write(b, {"exact/tap/head.fc": put(i)}, modes=("exact",), name=f"zero-{b}",
                                             response={}) for i, b in enumerate(TWO)])),
        "imprecise": result(
            compare(
                [write(b, {CONV: put(0.1 * i)}, dtype="float32", response=responses(arrays(dtype="float32"), 1.0))
                 for i, b in enumerate(TWO)],
                truth=write("torch", name="truth"),
            )
        ),
        "steps": result(
            compare([write(b, {of_step(2, "param"): lambda a: a * 1.1} if b == "flax" else None, modes=STEPS)
                     for b in THREE])
        ),
        "order": result(
            compare([write(b, modes=ALL, name=f"order-{b}", order_response={"train/tap/stem.norm": 1e-6} if b == "flax"
                           else {}) for b in TWO])
        ),
        "soft": result(compare([write("torch", modes=ALL), write("keras:jax", modes=ALL)], float32=float32)),
        "crashed": result(
            failures={"flax": BackendCrashed("backend flax: its process was killed; \x1b[31mlast\x00 words <&>\ufffe")}
        ),
        "nothing": result(),
    }  # fmt: skip


PASSING = {"same", "soft"}
OUTCOMES = (
    "same", "different", "not finite", "not finite anywhere", "undecided", "reported", "no response", "imprecise",
    "steps", "order", "soft", "crashed", "nothing",
)  # fmt: skip


class TestReports:
    @pytest.mark.parametrize("name", OUTCOMES)
    def test_json_is_strict_and_says_whether_it_passed(self, outcomes, tmp_path, name):
        path = tmp_path / "out.json"
        report_json.write_json(path, [outcomes[name]])

        def refuse(token):
            raise AssertionError(f"{token} is no JSON")

        data = json.loads(path.read_text(), parse_constant=refuse)
        assert data["passed"] == outcomes[name].passed == (name in PASSING)
        assert len(data["checks"]) == len(outcomes[name].comparisons)
        for check, compared in zip(data["checks"], outcomes[name].comparisons, strict=True):
            assert (check["variant"], check["dtype"]) == ("tiny", compared.dtype)
            assert check["passed"] == compared.passed
            assert check["modes"].keys() == {d.tensor.mode for d in compared.differences}
            for pairs in check["modes"].values():
                assert pairs.keys() <= {" | ".join(d.pair) for d in compared.differences}
                for found in pairs.values():
                    assert {"error", "response", "tensor"} <= found.keys()
                    known = {n.split("/", 2)[-1] for n in expected_arrays(compared.modes)}
                    assert found["tensor"] in known

    def test_json_gives_for_each_mode_and_pair_the_worst_error_its_response_and_its_tensor(self, outcomes):
        (check,) = report_json.as_json([outcomes["different"]])["checks"]
        worst = check["modes"]["eval"]["torch | flax"]
        assert worst["tensor"] == "stages.0.blocks.0.conv1"
        assert worst["error"] == pytest.approx(1 / record.norm(arrays(ALL)[CONV]))
        assert worst["response"] == pytest.approx(1e-12)
        assert worst["verdict"] == "different"
        assert check["modes"]["eval"]["torch | keras:tensorflow"]["error"] == 0
        assert check["modes"]["grad"]["torch | flax"]["tensor"] == "input"
        assert check["modes"]["grad"]["torch | flax"]["pass"] == "train"
        assert check["first_difference"]["tensor"] == "stages.0.blocks.0.conv1"
        assert check["odd_one_out"] == "flax"

    def test_json_names_the_step_and_what_of_it_differs_first(self, outcomes):
        (check,) = report_json.as_json([outcomes["steps"]])["checks"]
        first = check["first_difference"]
        assert (first["step"], first["kind"], first["tensor"]) == (2, "param", "stages.0.blocks.0.conv1.kernel")
        assert check["modes"]["steps"]["torch | flax"]["verdict"] == "different"
        assert check["recipe"] == recipes.to_dict(RECIPE.replace(batch_size=2))
        assert report_json.as_json([outcomes["different"]])["checks"][0]["recipe"] is None

    def test_junit_has_a_case_for_every_kind_of_array_of_the_steps(self, outcomes, tmp_path):
        path = tmp_path / "out.xml"
        junit.write_junit(path, [outcomes["steps"]])
        cases = {case.get("name"): case for case in ElementTree.parse(path).findall("./testsuite/testcase")}
        failed = {name for name, case in cases.items() if case.find("failure") is not None}
        assert failed == {"steps, param torch | flax", "steps, param keras:tensorflow | flax"}
        assert len(cases) == 4 * 3
        message = cases["steps, param torch | flax"].find("failure").get("message")
        assert "different at stages.0.blocks.0.conv1.kernel after step 2" in message

    def test_json_shows_a_failure_before_a_larger_difference_that_is_only_reported(self, outcomes):
        (compared,) = outcomes["reported"].comparisons
        assert {d.verdict for d in compared.differences} == {"same", "reported", "different"}
        (check,) = report_json.as_json([outcomes["reported"]])["checks"]
        assert check["modes"]["grad"]["torch | flax"]["verdict"] == "different"

    def test_json_of_no_results_has_not_passed(self):
        assert report_json.as_json([])["passed"] is False

    def test_json_fails_as_a_whole_if_one_result_does(self, outcomes):
        assert report_json.as_json([outcomes["same"]])["passed"] is True
        assert report_json.as_json([outcomes["same"], outcomes["different"]])["passed"] is False

    @pytest.mark.parametrize("name", OUTCOMES)
    def test_junit_parses_and_counts_its_failures(self, outcomes, tmp_path, name):
        path = tmp_path / "out.xml"
        junit.write_junit(path, [outcomes[name], outcomes["same"]])
        suites = ElementTree.parse(path).getroot().findall("testsuite")
        assert len(suites) == 2
        suite, same = suites
        for found in suites:
            cases = found.findall("testcase")
            assert int(found.get("tests")) == len(cases)
            assert int(found.get("failures")) == len([c for c in cases if c.find("failure") is not None])
            assert int(found.get("errors")) == len([c for c in cases if c.find("error") is not None])
        assert (same.get("failures"), same.get("errors")) == ("0", "0")
        failed = int(suite.get("failures")) + int(suite.get("errors"))
        assert (failed > 0) == (name not in PASSING and name != "nothing")

    def test_junit_has_a_case_for_every_mode_and_pair(self, outcomes, tmp_path):
        path = tmp_path / "out.xml"
        junit.write_junit(path, [outcomes["different"]])
        cases = ElementTree.parse(path).findall("./testsuite/testcase")
        sections = ("eval", "train", "grad, eval", "grad, train")
        pairs = ("torch | keras:tensorflow", "torch | flax", "keras:tensorflow | flax")
        assert sorted(case.get("name") for case in cases) == sorted(f"{s} {p}" for s in sections for p in pairs)
        failed = {case.get("name") for case in cases if case.find("failure") is not None}
        assert failed == {f"{s} {p}" for s in ("eval", "grad, train") for p in pairs if "flax" in p}
        assert "stages.0.blocks.0.conv1" in cases[1].find("failure").get("message")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("same", ["SAME FUNCTION", "torch | flax", "bit-equal", "L1 identity in float64", "rel. error"]),
            (
                "different",
                [
                    "NOT SHOWN TO BE THE SAME",
                    "first difference: stages.0.blocks.0.conv1 (eval), torch | flax",
                    "the odd one out: flax",
                ],
            ),
            ("not finite", [f"flax: {CONV} has values that are NaN or infinite", "train/tap/head.fc is missing"]),
            ("not finite anywhere", ["NOT SHOWN TO BE THE SAME"]),
            ("undecided", ["undecided: 1 arrays, stages.0.blocks.0.conv1 (eval) first", "--batch"]),
            ("reported", ["(reported)", "head.fc.kernel (grad, eval)"]),
            ("no response", ["L0 exact", "first difference: head.fc"]),
            ("imprecise", ["imprecise: flax at stages.0.blocks.0.conv1 (eval)", "the limit is 5"]),
            ("steps", ["first difference: stages.0.blocks.0.conv1.kernel, step 2 (steps, param)", "steps, velocity"]),
            (
                "order",
                [
                    "flax depends on the order of the batch: first at stem.norm (train)",
                    "the limit is 1000",
                    "the odd one out: flax",
                ],
            ),
            ("soft", ["keras:jax rounds to float32 inside this float64 network", "SAME FUNCTION"]),
            ("crashed", ["its process was killed", "NOT SHOWN TO BE THE SAME"]),
            ("nothing", ["NOT SHOWN TO BE THE SAME"]),
        ],
    )
    def test_the_console_says_what_a_reader_needs(self, outcomes, name, expected):
        shown = io.StringIO()
        Console(file=shown, width=200).print(console.result(outcomes[name]))
        text = " ".join(shown.getvalue().split())
        for part in expected:
            assert part in text
        assert ("SAME FUNCTION" in text) == (name in PASSING)

    @pytest.mark.parametrize(
        "table", [lambda: networks.layers(SPEC, (8, 8)), lambda: networks.variants({"tiny": SPEC})]
    )
    def test_the_tables_of_networks_show_their_parameters(self, table):
        shown = io.StringIO()
        Console(file=shown, width=200).print(table())
        assert f"{sum(layer.parameter_count for layer in SPEC.layers):,}" in shown.getvalue()

    @pytest.mark.parametrize("write_", [report_json.write_json, junit.write_junit])
    def test_a_report_that_cannot_be_written_is_one_line(self, outcomes, tmp_path, write_):
        with pytest.raises(ParityError, match="cannot be written: No such file or directory"):
            write_(tmp_path / "none" / "out", [outcomes["same"]])
