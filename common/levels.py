"""Every tolerance of the project, each with its derivation. Nothing else in the tree holds one.

A tolerance is measured, not chosen: the reference network is run again with every weight and input moved by -1, 0 or
+1 unit in the last place, `DRAWS` times, and the largest change of a tensor is its one-ulp response ρ. Two
implementations of one function differ by rounding alone, and rounding the weights once is the least that any
implementation does.
"""

DRAWS = 3

# Unit roundoff: half the distance from 1 to the next number.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}

# L1 and L2: ‖a-b‖ <= RESPONSE_FACTOR * max(ρ, FLOOR * u * ‖b‖). Over all gradients and logits of ResNet-50 and -101
# the ratio ‖a-b‖ / ρ of correct implementations has median 1.1 to 1.9 and maximum 3.1: 8 leaves room and no more. The
# floor is for tensors that so few roundings reach that three draws may miss them all.
RESPONSE_FACTOR = 8.0
FLOOR = 4.0

# L1 decides only where the response is below this share of the largest norm in the tensor's layer: at 1e-9 a planted
# eps of 1.1e-5 instead of 1e-5 still stands far above it. Elsewhere the network amplifies rounding too much.
DECIDABLE = {
    "float64": 1e-9,
    # L2: float32 gradients and batch statistics flip ReLU and max-pool choices; a gate is honest below 1e-4 only,
    # and only where no array of the same pass shows a larger one: a flip moves few arrays, and draws may miss them.
    "float32": 1e-4,
}

# L2: a backend's own rounding error, ‖float32 - float64‖, against the lower median of all backends. Correct ones differ
# by the order of their sums, a factor of 2 or so; TF32 (2^-11) and bfloat16 (2^-9) lie far above float32 (2^-24).
PRECISION_FACTOR = 5.0

# A tensor with a larger share of zeros carries too little to prove anything.
ZERO_SHARE = 0.95

# Integers up to here are exact in float32, and so is every sum of them (L0).
EXACT_INTEGER = 2**24
