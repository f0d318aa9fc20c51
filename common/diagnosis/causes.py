"""What people get wrong, by the key that a finding has, in the words that a person calls it by."""

from collections.abc import Mapping

CAUSES: Mapping[str, str] = {
    # Convolutions and dense layers
    "padding": "other padding",
    "padding_mode": "other values in the padding",
    "stride": "another stride",
    "dilation": "another dilation",
    "kernel_transposed": "a transposed kernel",
    "kernel_flipped": "a flipped kernel",
    "groups": "another number of groups",
    "groups_interleaved": "groups interleaved",
    "flatten_order": "a map flattened in another order",
    "bias_missing": "a bias missing",
    "bias_twice": "a bias added twice",
    "bias_extra": "a bias where there is none",
    "index_shifted": "entries counted from another number",
    # Norms
    "eps": "another eps",
    "momentum": "another momentum",
    "variance_unbiased": "the unbiased variance",
    "variance_biased": "the biased variance",
    "variance_form": "a standard deviation of another form",
    "batch_statistics": "batch statistics in eval mode",
    "running_statistics": "running statistics in training mode",
    "statistics_not_updated": "statistics that are not updated",
    "scale_bias_swapped": "scale and bias swapped",
    "mean_var_swapped": "mean and variance swapped",
    "scale_missing": "a scale missing",
    "norm_axes": "a norm over other axes",
    "norm_not_centred": "a norm without or with its mean",
    # Arrays
    "never_loaded": "arrays never loaded",
    "array_differs": "another array",
    # Activations and pools
    "activation": "another activation",
    "activation_missing": "an activation missing",
    "activation_extra": "an activation where there is none",
    "activation_before_addition": "an activation before the addition",
    "average_for_maximum": "average for maximum",
    "pool_window": "another window of a pool",
    "pool_counted": "borders counted or not",
    "pool_ceil": "windows that hang over the end",
    "lrn": "another local response norm",
    "gate": "another gate",
    "softmax_twice": "softmax twice",
    "softmax_missing": "softmax missing",
    "softmax_extra": "a softmax where there is none",
    "softmax_axis": "a softmax over another axis",
    "dropout_on": "dropout on in eval mode",
    "scale_factor": "a constant factor",
    # Between layers
    "branch_missing": "a branch missing",
    "branch_extra": "a branch extra",
    "branch_other": "a branch from elsewhere",
    "order": "another order",
    "merge": "merged in another way",
    "axes_swapped": "axes swapped",
    "expression": "another formula",
    # The model's input
    "input_bgr": "channels in another order",
    "input_range": "another range of the input",
    "input_normalised": "an input normalised otherwise",
    "input_transposed": "an input transposed or flipped",
    # The network
    "shared_layer": "a layer shared in one and not in the other",
    "block_extra": "a block extra",
    "block_missing": "a block missing",
    "block_order": "blocks in another order",
    "field": "another network of the family",
    "arrays_swapped": "arrays of another layer",
    # Numbers and gradients
    "precision": "a coarser precision inside",
    "detached": "a tensor detached",
    "gradient_scaled": "a gradient scaled",
    "straight_through": "a gradient passed straight through",
    "statistics_detached": "statistics not differentiated through",
    "gradient_at_zero": "another gradient at zero",
}

# Of two causes at one layer, the key of a finding is that of the first, this, and that of the second.
AND = "+"


def title(cause: str) -> str:
    """The words for a finding's cause, which may be two of them."""
    return " and ".join(CAUSES[one] for one in cause.split(AND))
