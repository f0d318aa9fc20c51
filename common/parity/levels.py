"""Every tolerance of the project, each with its derivation. Nothing else in the tree holds one.

A tolerance is measured, not chosen: the reference network is run again with every weight and input moved by -1, 0 or
+1 unit in the last place, `DRAWS` times, and the largest change of a tensor is its one-ulp response. (In mode steps
the powers of AdamW's betas are moved too: see `common.parity.steps.rates`.) Two implementations of one function
differ by rounding alone, and rounding the weights once is the least that any implementation does.

What each addition of a long sum rounds away is decided by the low bits of the partial sum, and is the same in every
such draw. So every backend runs the same images in other orders too, and the largest change, with the results put back
in order, is its order response: of that backend's own sums. Of a pair ρ is made of all three by `rho`.
"""

DRAWS = 3

# The same images in so many other orders, where the batch has them.
ORDERS = 3
# A backend's order response is believed up to here, in one-ulp responses of the reference (or in what the floor below
# makes of it). Honest ones reach about 150; float32 inside one layer of a float64 network stands near 5e8.
ORDER_LIMIT = 1000.0

# Unit roundoff: half the distance from 1 to the next number.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}

# L1 and L2: ‖a-b‖ <= RESPONSE_FACTOR * ρ, see `rho`. Over all gradients and logits of ResNet-50 and -101 the ratio of
# correct implementations has median 1.1 to 1.9 and maximum 3.1; over 1,000 random small networks the maximum is 5.3: 8
# leaves room and no more. FLOOR, in units of u ‖b‖, is for tensors that so few roundings reach that three draws may
# miss all.
RESPONSE_FACTOR = 8.0
FLOOR = 4.0

# L1 decides only where the response is below this share of the largest norm in the tensor's layer: at 1e-9 a planted
# eps of 1.1e-5 instead of 1e-5 still stands far above it. Elsewhere the network amplifies rounding too much.
DECIDABLE = {
    "float64": 1e-9,
    # L2: float32 rounding flips ReLU and max-pool choices; a gate is honest below 1e-4 only, and for a gradient only
    # where no other gradient of its pass exceeds that. ResNet-152 at 64, training: one unit of 8192 in
    # stages.2.blocks.11.relu1 is 0 in PyTorch and 4e-8 in Flax, which moves the gradient of the norm before it by 2 %
    # where its own three draws show 1e-5, and other layers' 3e-3.
    "float32": 1e-4,
}

# L2: a backend's own rounding error, ‖float32 - float64‖, against the lower median of all backends. Correct ones differ
# by the order of their sums, a factor of 2 or so; TF32 (2^-11) and bfloat16 (2^-9) lie far above float32 (2^-24). Of an
# array of few values the median may be small by luck: of 20 probabilities TensorFlow's were 5.2 medians off with the
# fewest instructions. What rounding the weights does, the one-ulp response, is no lack of precision either.
PRECISION_FACTOR = 5.0

# Two passes of one model on one input that differ by more than this share of the norm are no rounding: the model draws
# random numbers. Threads that add in another order each time reach 1e-13 and 1e-5 in deep networks.
RANDOM = {"float64": 1e-8, "float32": 1e-3}

# Arrays of two models that are the same to this share of the norm are taken for one another when layers are matched:
# far above rounding in float64, far below any fault that a diagnosis could name. No verdict depends on it.
SAME_VALUES = 1e-6

# A hypothesis explains a difference where the reference, changed by it, is left with so little of the other's norm, and
# with so small a share of the difference. Both are far above rounding (1e-15 and 1e-7 of a layer alone) and far below
# what any two hypotheses differ by: one that is nearly right leaves a hundredth of a difference, not a thousandth.
EXPLAINED = {"float64": 1e-10, "float32": 1e-5}
EXPLAINED_SHARE = 1e-3

# A tensor with a larger share of zeros carries too little to prove anything.
ZERO_SHARE = 0.95


def floor(terms: int) -> float:
    """The least response of an array, in units of u ‖b‖, whose elements are sums of so many `terms`.

    A sum of n terms, in any order, is off by at most (n - 1) u Σ|x| (Higham 2002, Accuracy and Stability of Numerical
    Algorithms, section 4.2). The response does not show that where rounding the weights moves all terms together:
    below a global average the terms of a bias's gradient are equal, and adding them one after another, as TensorFlow
    does, errs to one side and reaches a tenth of the bound, where adding them in pairs errs by u. A velocity or moment
    of an optimiser is a sum of such gradients, or of their squares, which are off by twice as much.
    """
    return max(FLOOR, terms / RESPONSE_FACTOR)


def rho(response: float, order_a: float, order_b: float) -> float:
    """What a pair's difference is held to: from the one-ulp response of the reference, its floor included, and the
    order responses of the two.

    ‖a-b‖ is at most the error of a and the error of b, and neither response contains the other: the three add. Of
    1,000 random networks the largest ratio is 5.3 so, 8.5 with the larger of the three, and 91 without order responses,
    where 221 networks leave the limit (`benchmarks/gate.py`).
    """
    return response + order_a + order_b


# A hypothesis explains a difference where the reference, changed by it, is left with so little of the other's norm, and
# with so small a share of the difference. Both are far above rounding (1e-15 and 1e-7 of a layer alone) and far below
# what any two hypotheses differ by: one that is nearly right leaves a hundredth of a difference, not a thousandth.
EXPLAINED = {"float64": 1e-10, "float32": 1e-5}
EXPLAINED_SHARE = 1e-3
