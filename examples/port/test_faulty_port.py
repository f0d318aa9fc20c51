"""Three ports with a mistake: these tests fail, to show what is said then."""

import resnet50_torch
import resnet_linen
import vit_flax
import vit_torch


def test_gelu(parity):
    original, images = vit_torch.model()
    parity.assert_same(original, vit_flax.faulty_gelu(), inputs=images, modes=["eval"])


def test_eps(parity):
    original, images = vit_torch.model()
    parity.assert_same(original, vit_flax.faulty_eps(), inputs=images, modes=["eval"])


def test_padding(parity):
    original, images = resnet50_torch.model()
    parity.assert_same(original, resnet_linen.faulty_padding(), inputs=images, modes=["eval"])
