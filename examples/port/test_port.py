"""The ports are the functions that were ported."""

import resnet50_torch
import resnet_linen
import vit_flax
import vit_torch


def test_the_vision_transformer_is_the_same_in_flax(parity):
    original, images = vit_torch.model()
    parity.assert_same(original, vit_flax.model(), inputs=images)


def test_resnet50_is_the_same_in_linen(parity):
    original, images = resnet50_torch.model()
    parity.assert_same(original, resnet_linen.model(), inputs=images, modes=["eval"])
