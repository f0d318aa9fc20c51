"""torchvision's feature extraction works on our PyTorch models, with torchvision's own node names."""

import pytest
import torch

import resnet_torch

models = pytest.importorskip("torchvision.models")
extraction = pytest.importorskip("torchvision.models.feature_extraction")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_the_graph_has_torchvisions_node_names(name):
    ours, theirs = getattr(resnet_torch, name)(), models.get_model(name, weights=None)
    assert extraction.get_graph_node_names(ours) == extraction.get_graph_node_names(theirs)


def test_the_same_nodes_give_the_same_features():
    theirs = models.resnet18(weights=None).double().eval()
    ours = resnet_torch.resnet18().double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    nodes = ["relu", "layer1.1.relu_1", "layer2.0.downsample.1", "layer3", "layer4.1.add", "flatten", "fc"]
    images = torch.randn(2, 3, 65, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = extraction.create_feature_extractor(ours, nodes)(images)
        b = extraction.create_feature_extractor(theirs, nodes)(images)
    assert list(a) == list(b) == nodes
    for node in nodes:
        assert torch.equal(a[node], b[node]), node
