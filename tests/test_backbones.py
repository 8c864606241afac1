"""Backbones by name, of several families, at several strides and sizes."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from pixcon.detect import build_detector, configure_detect
from pixcon.encoder import (check_backbone, feature_shape, library_weights, make_backbone,
                            own_network)
from pixcon.export import export_backbone, load_backbone, read_weights
from pixcon.model import PixCon
from pixcon.run import trained_backbone
from pixcon.segment import configure_segment, make_segmenter
from pixcon.study import random_weights
from pixcon.training import Pretraining, configure, pretrain

ROOT = Path(__file__).parent.parent


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
    ('swin_tiny_patch4_window7_224', 64, (768, 2, 2)),
    ('vit_tiny_patch16_224', 64, (192, 4, 4))])
def test_timm(name, size, shape):
    "timm's models, channels first, transformers in views of their own size or another, each parameter with a gradient."
    backbone = make_backbone(name)
    assert feature_shape(backbone, size) == shape
    check_backbone(backbone, size)
    whole = timm.create_model(name)
    cut = set(library_weights(backbone, name))
    assert cut <= set(whole.state_dict())
    if name.startswith('vit'): assert any(n.startswith('blocks.11.') for n in cut)  # the last block's map


def test_timm_of_one_size():
    "A network that takes images of one size only is refused with its own reason."
    with pytest.raises(ValueError, match=r"can't take an image of 64 x 64 pixels: .*doesn't match model \(224\)"):
        feature_shape(make_backbone('cait_xxs24_224'), 64)


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


YOLO = '''
import timm
from torch import nn
def block(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU())
class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.p2, self.net = block(3, 8), block(8, 16), block(16, 32)
    def forward(self, x):
        p2 = self.p2(self.stem(x))
        return dict(p2=p2, p3=self.net(p2))
class build(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone, self.head = backbone or Backbone(), nn.Conv2d(32, 5, 1)
def vit(): return timm.create_model('vit_tiny_patch16_224', depth=3, features_only=True, dynamic_img_size=True)
def swin(): return timm.create_model('swin_tiny_patch4_window7_224', features_only=True, out_indices=(0, 1))
'''
OWN = dict(data='scenes', scenes=16, batch=8, epochs=2, hidden=16, dim=8, workers=0, amp='off',
           backbone='yolo_of_a_test:build', part='backbone')


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A working directory with a detector in a file; it is not on sys.path."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p])
    (tmp_path/'yolo_of_a_test.py').write_text(YOLO)
    yield tmp_path
    sys.modules.pop('yolo_of_a_test', None)


def change(project, old, new):
    "Edits the detector's file, as between two commands."
    file = project/'yolo_of_a_test.py'
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    sys.modules.pop('yolo_of_a_test', None)
    shutil.rmtree(project/'__pycache__', ignore_errors=True)


def test_own_network_and_back(project):
    """Trained under its own names, also with one called `net`; exported weights load into the part and into
    the whole model, and give the map that the run ended with."""
    pretrain(**OWN, out='run')
    assert json.loads(Path('run/source.json').read_text())['file'] == 'yolo_of_a_test.py'
    own, part = own_network('yolo_of_a_test:build'), own_network('yolo_of_a_test:build').backbone
    part.load_state_dict(load_file('run/backbone.safetensors'))
    x = torch.randn(2, 3, 64, 64)
    expected = part.eval()(x)['p3']                                # (2,32,8,8)
    assert torch.equal(trained_backbone('run')[0].eval()(x), expected)
    for layout, into in (('safetensors', own.backbone), ('whole', own)):
        path = export_backbone('run', 'out', layout)
        missing = into.load_state_dict(read_weights(path)[0], strict=False).missing_keys
        assert missing == (['head.weight', 'head.bias'] if layout == 'whole' else [])
        assert torch.equal(own.eval().backbone(x)['p3'], expected)
        assert torch.equal(load_backbone(path).eval()(x), expected)
        about = read_weights(path)[1]
        scope = dict(torch=torch, load_file=load_file, yolo_of_a_test=sys.modules['yolo_of_a_test'])
        exec(about['use'].replace(path.name, str(path)), scope)     # the hint, to the letter
        assert torch.equal(scope['model'].eval().backbone(x)['p3'], expected)
    with pytest.raises(ValueError, match='possible layouts for it: safetensors, whole'): export_backbone('run', 'out')


def test_own_network_resumes(project, capsys):
    "With another file and the same tensors, and it says so; with other tensors it is refused, and says which."
    pretrain(**OWN, out='run')
    change(project, 'nn.SiLU()', 'nn.ReLU()')
    pretrain(**OWN | dict(epochs=3), out='run')
    assert 'yolo_of_a_test.py has changed since step 0' in capsys.readouterr().out
    change(project, 'block(8, 16), block(16, 32)', 'block(8, 24), block(24, 32)')
    message = r"another network: 12 tensors, the first is 'online.backbone.p2.0.weight' of shape \(16, 8, 3, 3\), now \(24,"
    with pytest.raises(ValueError, match=message): pretrain(**OWN | dict(epochs=4), out='run')
    change(project, 'self.stem, self.p2', 'self.first, self.p2')
    change(project, 'self.stem(x)', 'self.first(x)')
    with pytest.raises(ValueError, match="'online.backbone.stem.0.weight'"): pretrain(**OWN | dict(epochs=4), out='run')


def test_own_network_fine_tuned(project):
    "Segmentation and detection begin with the run's weights; a pyramid stands on all maps that the network gives."
    pretrain(**OWN, out='run')
    expected = load_file('run/backbone.safetensors')
    config, _, val = configure_segment(checkpoint='run', labelled=2, test=2)
    net = make_segmenter(config, val.classes)
    given = configure_detect(checkpoint='run', labelled=2, test=2)
    assert (config.part, given.part, given.stride) == ('backbone', 'backbone', 0)
    body = build_detector(given, 8).backbone
    assert body.strides == [4, 8]
    for backbone in (net.backbone, body.backbone):
        for n, t in backbone.state_dict().items(): assert torch.equal(t, expected[n]), n
    f = body(torch.randn(1, 3, 64, 64))
    assert [f[n].shape[2] for n in '01'] == [16, 8]


@pytest.mark.parametrize('command', [
    [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'pixcon.training'],
    ['papermill']])
def test_own_network_from_the_working_directory(project, command):
    "Processes of torchrun and the kernel of papermill find it, too."
    given = OWN | dict(out='run', epochs=1)
    notebook = command == ['papermill']
    environment = os.environ | dict(PYTHONPATH=str(ROOT)) | (dict(IN_TEST='1') if notebook else {})
    if notebook: words = [ROOT/'nbs'/'train.ipynb', 'o.ipynb', *(w for n, v in given.items() for w in ('-p', n, str(v)))]
    else: words = [f'--{n}={v}' for n, v in given.items()]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    if notebook: assert 'yolo_of_a_test:build: 6,' in Path('o.ipynb').read_text()
    else: assert set(load_file('run/backbone.safetensors')) == set(own_network(OWN['backbone']).backbone.state_dict())


def test_study_of_an_own_network(project):
    "The same random weights as a run of that seed begins with."
    config, images = configure(**OWN, out='run')
    begun = Pretraining(config, images).model.online.backbone.state_dict()
    for n, t in random_weights(config).state_dict().items(): assert torch.equal(t, begun[n]), n


@pytest.mark.parametrize('name,shape', [('vit', (192, 4, 4)), ('swin', None)])
def test_own_transformer(project, name, shape):
    "A plain ViT of timm works; Swin's channels come last and are refused with the remedy."
    make = f'yolo_of_a_test:{name}'
    if shape: assert feature_shape(make_backbone(make), 64) == shape
    else:
        with pytest.raises(ValueError, match=r'its channels last: let it end with .permute\(0, 3, 1, 2\)'):
            feature_shape(make_backbone(make))
