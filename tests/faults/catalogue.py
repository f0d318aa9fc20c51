"""The table of planted faults."""

from importlib import import_module
from typing import Any

import numpy as np

from tests.faults.networks import NETWORKS
from tests.faults.planting import Fault, Model, Plan

MODELS = {
    "torch modules": Model(network="residual", module="torch_models", make="Residual"),
    "linen compact": Model(network="residual", module="flax_models", make="compact"),
    "nnx": Model(network="residual", module="flax_models", make="NnxResidual"),
    "torch sequential": Model(network="plain", module="torch_models", make="sequential"),
    "torch functional": Model(network="plain", module="torch_models", make="Functional"),
    "keras functional": Model(network="plain", module="keras_models", make="functional"),
    "torch mobile": Model(network="mobile", module="torch_models", make="Mobile"),
    "linen setup": Model(network="mobile", module="flax_models", make="mobile"),
    "keras subclass": Model(network="mobile", module="keras_models", make="mobile"),
    "torch transformer": Model(network="vit", module="torch_models", make="Transformer"),
    "linen transformer": Model(network="vit", module="flax_models", make="transformer"),
    "keras transformer": Model(network="vit", module="keras_models", make="transformer"),
    "torch einops": Model(network="mixer", module="torch_models", make="mixer"),
    "nnx mixer": Model(network="mixer", module="flax_models", make="NnxMixer"),
    "torch branches": Model(network="unet", module="torch_models", make="Branches"),
    "keras branches": Model(network="unet", module="keras_models", make="branches"),
    "torch responses": Model(network="lrn", module="torch_models", make="responses"),
    "linen responses": Model(network="lrn", module="flax_models", make="responses"),
}
CLEAN = (
    ("torch modules", "linen compact"),
    ("torch modules", "nnx"),
    ("nnx", "linen compact"),
    ("torch sequential", "torch functional"),
    ("torch functional", "keras functional"),
    ("keras functional", "torch sequential"),
    ("torch mobile", "linen setup"),
    ("linen setup", "keras subclass"),
    ("torch transformer", "linen transformer"),
    ("keras transformer", "torch transformer"),
    ("torch einops", "nnx mixer"),
    ("torch branches", "keras branches"),
    ("torch responses", "linen responses"),
)


def made(key: str, fault: Fault | None = None) -> tuple[Any, Plan]:
    """A model, and the plan it was made by."""
    model = MODELS[key]
    weights = NETWORKS[model.network].weights()
    plan = Plan(fault.plan if fault else {})
    if fault and fault.weights:
        weights = fault.weights(weights)
    make = getattr(import_module(f"tests.faults.{model.module}"), model.make)
    found = make(weights, plan)
    if model.module == "torch_models":
        found.eval()
    return found, plan


def images(key: str) -> np.ndarray:
    """As the model takes them."""
    model = MODELS[key]
    found = NETWORKS[model.network].images()
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2)) if model.module == "torch_models" else found
