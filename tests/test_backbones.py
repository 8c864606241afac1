"""Backbones by name, of several families, at several strides and sizes."""
import pytest
import torch
import torchvision
from torch import nn
from pixcon.encoder import feature_shape, library_weights, make_backbone
from pixcon.model import PixCon


@pytest.mark.parametrize('name,stride,shape', [
    ('resnet18', None, (512, 3, 5)),
    ('resnet18', 0, (512, 3, 5)),
    ('resnet18', 8, (128, 12, 20)),
    ('resnet50', 16, (1024, 6, 10)),
    ('convnext_tiny', None, (768, 3, 5)),
    ('convnext_tiny', 8, (192, 12, 20)),
    ('swin_t', 8, (192, 12, 20)),
    ('shufflenet_v2_x1_0', 8, (116, 12, 20)),
    ('regnet_x_400mf', None, (400, 3, 5))])
def test_torchvision(name, stride, shape):
    "The map has the stride asked for, in train mode, and every key is the library's own."
    backbone = make_backbone(name, stride)
    assert feature_shape(backbone, (96, 160)) == shape and backbone.training
    whole = torchvision.models.get_model(name)
    assert set(backbone.state_dict()) <= set(whole.state_dict())


@pytest.mark.parametrize('name,size,shape', [
    ('resnet26', 128, (2048, 4, 4)),
    ('swin_tiny_patch4_window7_224', 224, (768, 7, 7))])
def test_timm(name, size, shape):
    "timm's models, where it is installed, channels first."
    timm = pytest.importorskip('timm')
    backbone = make_backbone(name)
    assert feature_shape(backbone, size) == shape
    whole = timm.create_model(name)
    assert set(library_weights(backbone, name)) <= set(whole.state_dict())


def test_probing_changes_nothing():
    "feature_shape leaves mode and running statistics alone."
    net = make_backbone('resnet18', 8)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    feature_shape(net)
    assert net.training
    for n, t in net.state_dict().items(): assert torch.equal(before[n], t), n


@pytest.mark.parametrize('wrong,message', [
    (('resnet18', 5), 'has no map of stride 5'),
    (('resnett', None), 'resnett'),
    (('vit_b_16', None), 'gives no feature map'),
    (('regnet_x_400mf', 16), r'it has \[2, 32\]')])
def test_names_what_is_wrong(wrong, message):
    "A name or stride that can't be had."
    with pytest.raises(ValueError, match=message): make_backbone(*wrong)


def test_module_of_ones_own():
    "Any module that gives a map works; one that does not is refused."
    tiny = dict(hidden=8, dim=4, queue=4, size=64)
    model = PixCon(nn.Conv2d(3, 7, 16, 16), **tiny)
    assert model.online.dense_head[0].in_channels == 7
    with pytest.raises(ValueError, match='one map'): PixCon(nn.Sequential(nn.Flatten()), **tiny)
