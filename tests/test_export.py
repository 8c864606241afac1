"""Weights out and back: every layout proves itself, and what is wrong is refused before it has a name."""
import json
import os
import pickle
import pickletools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from torchvision.io import write_jpeg
from pixcon import export
from pixcon.export import export_backbone, from_detectron2, layouts, load_backbone, read_weights, to_detectron2
from pixcon.training import Run, configure

ROOT = Path(__file__).parent.parent
HAS_TIMM = find_spec('timm') is not None
RESNETS = [n for n in torchvision.models.list_models(module=torchvision.models) if torchvision.models.get_model_builder(n).__module__.endswith('.resnet')]
ALL = ('torchvision', 'timm', 'detectron2', 'mm', 'safetensors')
FACTS = {'encoder', 'backbone', 'stride', 'step', 'variant', 'config', 'layout', 'library', 'map', 'left_at_random', 'input', 'licence', 'use', 'checked'}


def unsettle(net):
    "Statistics and scales as after training, so that a tensor that is left out shows."
    with torch.no_grad():
        for n, t in net.state_dict().items():
            if n.endswith('num_batches_tracked'): t.fill_(7)
            elif t.ndim == 1 and t.is_floating_point(): t.uniform_(.5, 1.5) if 'mean' not in n and 'bias' not in n else t.normal_(0, .1)


@pytest.fixture(scope='module')
def make_run(tmp_path_factory):
    "A function that writes the folder of a run with two different encoders, once for each set of parameters."
    made = {}
    def make(backbone='resnet18', stride=0, size=64, data='scenes'):
        key = backbone, stride, size, data
        if key not in made:
            made[key] = tmp_path_factory.mktemp('run')
            run = Run(*configure(data=data, scenes=4, batch=2, epochs=1, size=size, hidden=8, dim=4, queue=4, backbone=backbone, stride=stride, out=made[key]))
            unsettle(run.model.online.backbone)
            unsettle(run.model.target.backbone)
            run.start()
            run.save()
        return made[key]
    return make


@pytest.fixture
def image():
    "One image, larger than those of the proofs."
    return torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(net, x): return net.eval()(x)


def possible(name): return [n for n in layouts(name) if n != 'timm' or HAS_TIMM]


@pytest.mark.parametrize('name,stride,size,left', [
    ('resnet18', 0, 64, 'fc'), ('resnet50', 0, 64, 'fc'), ('resnet18', 8, 32, 'layer3, layer4, fc'), ('resnet50', 16, 64, 'layer4, fc'),
    ('shufflenet_v2_x1_0', 8, 32, 'stage3, stage4, conv5, fc'), ('convnext_tiny', 8, 32, 'features.4, features.5, features.6, features.7, classifier'),
    ('swin_t', 0, 64, 'head')])
def test_round_trip(make_run, tmp_path, image, name, stride, size, left):
    "Every layout that a network has gives back the same tensors and features, and says what it leaves out."
    run = make_run(name, stride, size)
    ours = load_backbone(run)
    assert layouts(name) == (ALL if name in RESNETS else ('torchvision', 'safetensors'))
    for layout in possible(name):
        path = export_backbone(run, tmp_path, layout)
        about, again = read_weights(path)[1], load_backbone(path)
        assert FACTS <= set(about) and all(isinstance(v, str) for v in about.values())
        assert (about['encoder'], about['layout'], about['backbone']) == ('online', layout, name)
        assert about['left_at_random'] == left
        for (n, a), b in zip(again.state_dict().items(), ours.state_dict().values()): assert torch.equal(a, b), n
        assert torch.equal(features(again, image), features(ours, image))
    assert not [p for p in tmp_path.iterdir() if 'part' in p.name]


@pytest.mark.parametrize('name,stride,size', [('resnet26', 0, 64), ('convnext_atto', 8, 32), ('vit_tiny_patch16_224', 0, 224)])
def test_timm_models(make_run, tmp_path, name, stride, size):
    "A backbone from timm goes out under timm's names and loads into timm's whole model."
    timm = pytest.importorskip('timm')
    run = make_run(name, stride, size)
    assert layouts(name) == ('timm', 'safetensors')
    x, ours = torch.randn(1, 3, size, size), load_backbone(run)
    for layout in layouts(name):
        path = export_backbone(run, tmp_path, layout)
        whole = timm.create_model(name)
        assert set(read_weights(path)[0]) <= set(whole.state_dict())
        assert torch.equal(features(load_backbone(path), x), features(ours, x))
    with pytest.raises(ValueError, match='torchvision has no .*possible layouts for it: timm, safetensors'): export_backbone(run, tmp_path, 'torchvision')


@pytest.mark.parametrize('name,stride', [('resnet18', 0), ('resnet50', 0), ('resnet50', 16)])
def test_torchvision_loads_it(make_run, tmp_path, image, name, stride):
    "The way its users do; what the file does not bring keeps the values it had."
    run = make_run(name, stride)
    path = export_backbone(run, tmp_path, 'torchvision')
    whole = torchvision.models.get_model(name)
    before = {n: t.clone() for n, t in whole.state_dict().items()}
    loaded = whole.load_state_dict(torch.load(path, weights_only=True), strict=False)
    left = {'fc'} if not stride else {'layer4', 'fc'}
    assert not loaded.unexpected_keys and {n.split('.')[0] for n in loaded.missing_keys} == left
    assert all(torch.equal(t, before[n]) for n, t in whole.state_dict().items() if n.split('.')[0] in left)
    stages = nn.Sequential(*list(whole.children())[:-2 if not stride else -3])
    assert torch.equal(features(stages, image), features(load_backbone(run), image))


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_timm_loads_it(make_run, tmp_path, image, name):
    "timm's model without classifier takes the file strictly."
    timm = pytest.importorskip('timm')
    run = make_run(name)
    whole = timm.create_model(name, num_classes=0)
    whole.load_state_dict(torch.load(export_backbone(run, tmp_path, 'timm'), weights_only=True), strict=True)
    assert torch.equal(whole.eval().forward_features(image), features(load_backbone(run), image))


class Conv(nn.Conv2d):
    "A convolution with its norm inside, which is how detectron2's names come about."
    def __init__(self, i, o, size, stride=1):
        super().__init__(i, o, size, stride, size//2, bias=False)
        self.norm = nn.BatchNorm2d(o)
    def forward(self, x): return self.norm(super().forward(x))


class Block(nn.Module):
    "Residual block of two or three convolutions, stride in the 3x3 one."
    def __init__(self, i, middle, o, stride):
        super().__init__()
        sizes = [(i, middle, 3), (middle, o, 3)] if o == middle else [(i, middle, 1), (middle, middle, 3), (middle, o, 1)]
        strided = 0 if o == middle else 1
        for k, (a, b, size) in enumerate(sizes): self.add_module(f'conv{k+1}', Conv(a, b, size, stride if k == strided else 1))
        self.n, self.shortcut = len(sizes), Conv(i, o, 1, stride) if i != o else None
    def forward(self, x):
        y = x
        for k in range(self.n): y = (F.relu if k < self.n - 1 else lambda t: t)(getattr(self, f'conv{k+1}')(y))
        return F.relu(y + (self.shortcut(x) if self.shortcut else x))


class DetectronNet(nn.Module):
    "A ResNet with the module tree that detectron2 documents: stem.conv1, res2 to res5."
    def __init__(self, blocks, wide): # blocks in each stage, channels out over channels inside
        super().__init__()
        self.stem, i = nn.Module(), 64
        self.stem.conv1 = Conv(3, 64, 7, 2)
        for s, n in enumerate(blocks):
            middle = 64*2**s
            self.add_module(f'res{s+2}', nn.Sequential(*(Block(i if k == 0 else middle*wide, middle, middle*wide, 2 if s and k == 0 else 1) for k in range(n))))
            i = middle*wide
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        for s in range(2, 6): x = getattr(self, f'res{s}', nn.Identity())(x)
        return x


@pytest.mark.parametrize('name,stride,blocks,wide', [('resnet18', 0, (2, 2, 2, 2), 1), ('resnet50', 0, (3, 4, 6, 3), 4), ('resnet50', 16, (3, 4, 6), 4)])
def test_detectron2_loads_it(make_run, tmp_path, image, name, stride, blocks, wide):
    "Read as detectron2 reads it, into a network with its names, strictly: the same features."
    run = make_run(name, stride)
    path = export_backbone(run, tmp_path, 'detectron2')
    with open(path, 'rb') as f: saved = pickle.load(f, encoding='latin1')
    assert saved['matching_heuristics'] is True and saved['__author__'] == 'pixcon'
    assert all(type(x) is np.ndarray and x.flags.writeable for x in saved['model'].values())
    net = DetectronNet(blocks, wide)
    net.load_state_dict({n: torch.from_numpy(x) for n, x in saved['model'].items()}, strict=True)
    ours, theirs = features(load_backbone(run), image), features(net, image)
    assert (theirs - ours).abs().max() <= 1e-6*ours.abs().max()
    asked = {op[1] for op in pickletools.genops(path.read_bytes()) if op[0].name in ('SHORT_BINUNICODE', 'BINUNICODE') and op[1] in ('numpy', 'ndarray', 'numpy._core.multiarray', '_reconstruct')}
    assert asked == {'numpy', 'ndarray'}


def test_mm_loads_it(make_run, tmp_path):
    "state_dict under `backbone.`, in torchvision's names behind it, all of them and no others."
    saved = torch.load(export_backbone(make_run('resnet50'), tmp_path, 'mm'), weights_only=True)
    assert set(saved) == {'state_dict', 'meta'} and all(n.startswith('backbone.') for n in saved['state_dict'])
    wanted = {n for n in torchvision.models.resnet50().state_dict() if not n.startswith('fc.')}
    assert {n.removeprefix('backbone.') for n in saved['state_dict']} == wanted
    assert saved['meta']['pixcon']['encoder'] == 'online'


@pytest.mark.parametrize('name', RESNETS)
def test_names_of_all_resnets(name):
    "torchvision's names and shapes are timm's; each has a detectron2 name of its own, and the way back leads back."
    with torch.device('meta'): ours = {n: t.shape for n, t in torchvision.models.get_model(name).state_dict().items()}
    theirs = {to_detectron2(n) for n in ours}
    assert len(theirs) == len(ours) and all(from_detectron2(to_detectron2(n)) == n for n in ours)
    assert {n.split('.')[0] for n in theirs} == {'stem', 'res2', 'res3', 'res4', 'res5'} and not any(w in n for n in theirs for w in ('layer', 'bn', 'downsample'))
    if HAS_TIMM:
        import timm
        with torch.device('meta'): assert ours == {n: t.shape for n, t in timm.create_model(name).state_dict().items()}


def spoilt(how):
    "A writer with a fault in what it writes."
    write, a, b = export.write_weights, 'layer1.0.conv1.weight', 'layer1.1.conv2.weight'
    faults = dict(scaled=lambda s: {**s, a: s[a]*1.00001}, swapped=lambda s: {**s, a: s[b], b: s[a]}, dropped=lambda s: {n: t for n, t in s.items() if n != a},
                  counter=lambda s: {n: t for n, t in s.items() if n != 'bn1.num_batches_tracked'}, renamed=lambda s: {n.replace('layer1.0.conv1', 'layer1.0.conv7'): t for n, t in s.items()},
                  nan=lambda s: {**s, a: s[a]*torch.nan}, shape=lambda s: {**s, a: s[a][:-1].clone()}, extra=lambda s: {**s, 'fc.weight': torch.zeros(1000, 512)})
    def spoil(path, state, layout, about):
        write(path, faults[how](state) if how in faults else state, layout, about)
        if how == 'cut': path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    return spoil


MESSAGES = dict(scaled='differ from ours by', swapped='differ from ours by', dropped=r'1 missing \(layer1.0.conv1.weight\)', counter='1 missing .bn1.num_batches_tracked',
                renamed=r'1 missing \(layer1.0.conv1.weight\); 1 unexpected \(layer1.0.conv7.weight\)', nan='not finite', shape='1 of another shape', extra=r'1 unexpected \(fc.weight\)', cut='truncated')


@pytest.mark.parametrize('layout,how', [('detectron2', h) for h in MESSAGES] + [(n, h) for n in ALL if n != 'detectron2' for h in ('swapped', 'dropped', 'cut')])
def test_refuses_what_is_wrong(make_run, tmp_path, monkeypatch, layout, how):
    "A fault in one tensor of the written file: an error, and nothing on the disk."
    if layout == 'timm': pytest.importorskip('timm')
    monkeypatch.setattr(export, 'write_weights', spoilt(how))
    with pytest.raises(ValueError, match=MESSAGES[how]): export_backbone(make_run('resnet18'), tmp_path/'out', layout)
    assert not (tmp_path/'out').exists()


def test_a_refused_export_leaves_the_older_file(make_run, tmp_path, monkeypatch):
    "And a slip in the rule for names is caught even though every name fits."
    path = export_backbone(make_run('resnet18'), tmp_path, 'detectron2')
    before, swap = path.read_bytes(), {'layer1.0.conv1.weight': 'res2.1.conv2.weight', 'layer1.1.conv2.weight': 'res2.0.conv1.weight'}
    monkeypatch.setattr(export, 'to_detectron2', lambda n: swap.get(n, to_detectron2(n)))
    with pytest.raises(ValueError, match='differ from ours by'): export_backbone(make_run('resnet18'), tmp_path, 'detectron2', encoder='online')
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_refuses_a_run_that_diverged(make_run, tmp_path):
    "NaN in a weight of the run itself."
    saved = torch.load(make_run('resnet18')/'checkpoint.pt', weights_only=True)
    saved['model']['online.backbone.conv1.weight'][0] = torch.nan
    torch.save(saved, tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='not finite'): export_backbone(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert export_backbone(tmp_path, tmp_path/'out', encoder='target').exists()


@pytest.mark.parametrize('layout', ALL)
def test_online_and_target(make_run, tmp_path, image, layout):
    "Two files side by side, each with its own weights and its own word in the metadata."
    if layout == 'timm': pytest.importorskip('timm')
    run, found = make_run('resnet18'), {}
    for encoder in ('online', 'target'):
        path = export_backbone(run, tmp_path, layout, encoder)
        assert read_weights(path)[1]['encoder'] == encoder
        found[encoder] = features(load_backbone(path, encoder=encoder), image)
        assert torch.equal(found[encoder], features(load_backbone(run, encoder=encoder), image))
        with pytest.raises(ValueError, match=f"holds the encoder '{encoder}'"): load_backbone(path, encoder={'online': 'target', 'target': 'online'}[encoder])
    assert not torch.allclose(found['online'], found['target'])


@pytest.mark.parametrize('layout', ALL)
@pytest.mark.parametrize('keep', [0., .001, .5, .999])
def test_truncated_file(make_run, tmp_path, layout, keep):
    "Cut anywhere, it is said to be truncated."
    if layout == 'timm': pytest.importorskip('timm')
    path = export_backbone(make_run('resnet18', 8, 32), tmp_path, layout)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(keep*len(whole))])
    with pytest.raises(ValueError, match='truncated or not a checkpoint'): load_backbone(path)


@pytest.mark.parametrize('keep', [0., .5, .999])
def test_truncated_run(make_run, tmp_path, keep):
    "A checkpoint that was cut off."
    whole = (make_run('resnet18', 8, 32)/'checkpoint.pt').read_bytes()
    (tmp_path/'checkpoint.pt').write_bytes(whole[:int(keep*len(whole))])
    with pytest.raises(ValueError, match='truncated or not a checkpoint'): export_backbone(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_foreign_checkpoints(tmp_path, make_run):
    "Names are listed, the first few and how many; a file that says nothing must be told what it is."
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path/'r34.pth')
    with pytest.raises(ValueError, match="does not say which network"): load_backbone(tmp_path/'r34.pth')
    with pytest.raises(ValueError, match=r'98 unexpected \(fc.bias, fc.weight, layer1.2.bn1.bias, layer1.2.bn1.num_batches_tracked and 94 more\)'): load_backbone(tmp_path/'r34.pth', 'resnet18')
    with pytest.raises(ValueError, match=r'of 318 tensors .*missing.*unexpected.*of another shape'): load_backbone(tmp_path/'r34.pth', 'resnet50')
    torch.save(dict(state_dict={'module.encoder_q.conv1.weight': torch.zeros(2)}), tmp_path/'moco.pth')
    with pytest.raises(ValueError, match=r'120 missing .* 1 unexpected \(module.encoder_q.conv1.weight\)'): load_backbone(tmp_path/'moco.pth', 'resnet18')
    torch.save(dict(epoch=3), tmp_path/'other.pth')
    with pytest.raises(ValueError, match='no tensors: epoch'): load_backbone(tmp_path/'other.pth', 'resnet18')
    torch.save(dict(epoch=3), tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='no checkpoint of a run: it has no config, step, model'): load_backbone(tmp_path)
    with pytest.raises(ValueError, match='files of type'): load_backbone(make_run('resnet18')/'config.json')
    with pytest.raises(FileNotFoundError, match='there is no file'): load_backbone(tmp_path/'none.pth')
    with pytest.raises(FileNotFoundError, match='is no run folder'): load_backbone(ROOT)


def test_a_plain_state_dict_of_ones_own(tmp_path, image):
    "Named by hand and cut by hand, it loads."
    net = torchvision.models.resnet18()
    unsettle(net)
    torch.save({n: t for n, t in net.state_dict().items() if n.split('.')[0] in ('conv1', 'bn1', 'layer1', 'layer2')}, tmp_path/'mine.pt')
    assert torch.equal(features(load_backbone(tmp_path/'mine.pt', 'resnet18', 8), image), features(nn.Sequential(*list(net.children())[:6]), image))


sprung = []


def spring(): sprung.append(1)


class Trap:
    "Calls a function when it is unpickled freely."
    def __reduce__(self): return spring, ()


@pytest.mark.parametrize('file', ['trap.pkl', 'trap.pth', 'checkpoint.pt'])
def test_no_code_runs_while_reading(tmp_path, file):
    "A pickle that asks for anything but numbers is refused, by name."
    sprung.clear()
    if file == 'trap.pkl': (tmp_path/file).write_bytes(pickle.dumps(dict(model=dict(a=Trap()), about={})))
    else: torch.save(dict(model=Trap(), config={}, step=1), tmp_path/file)
    with pytest.raises(ValueError, match='it asks for .*spring'): load_backbone(tmp_path/file, 'resnet18')
    assert not sprung
    pickle.loads(pickle.dumps(Trap()))
    assert sprung


def test_arrays_of_objects_are_refused(tmp_path):
    "numpy.ndarray is the one call a .pkl may make, and only for numbers."
    class Objects:
        def __reduce__(self): return np.ndarray, ((1,), '|O', bytearray(8))
    (tmp_path/'o.pkl').write_bytes(pickle.dumps(dict(model=dict(a=Objects())), 4))
    with pytest.raises(ValueError, match="not of numbers"): load_backbone(tmp_path/'o.pkl', 'resnet18')


def test_layouts_that_there_are_not(make_run, tmp_path):
    "The error says which are possible."
    run = make_run('shufflenet_v2_x1_0', 8, 32)
    for layout in ('timm', 'detectron2', 'mm'):
        with pytest.raises(ValueError, match=f'{layout} has no shufflenet_v2_x1_0; possible layouts for it: torchvision, safetensors'): export_backbone(run, tmp_path/'out', layout)
    with pytest.raises(ValueError, match="layout must be one of torchvision, timm, .* got 'caffe'"): export_backbone(run, tmp_path/'out', 'caffe')
    with pytest.raises(ValueError, match="'online' or 'target', got 'ema'"): export_backbone(run, tmp_path/'out', encoder='ema')
    assert not (tmp_path/'out').exists()


def test_card_and_privacy(make_run, tmp_path):
    "The card names data, encoder, use and numbers; no file gives away a folder of the machine."
    photos = tmp_path/'secret place'/'photos'
    photos.mkdir(parents=True)
    for i in range(4): write_jpeg(torch.randint(0, 255, (3, 48, 48), dtype=torch.uint8), str(photos/f'{i}.jpg'))
    run = make_run('resnet18', 8, 32, str(photos))
    card = lambda: (tmp_path/'out'/'resnet18-online.md').read_text()
    export_backbone(run, tmp_path/'out', 'safetensors', licence='cc-by-4.0')
    for text in ('license: cc-by-4.0', 'Unlabelled images from photos.', '| encoder | online |', '| left at random | layer3, layer4, fc |', "load_backbone('resnet18-online.safetensors')", '| tau | 0.2 |'): assert text in card()
    assert '## Curves' not in card() and '## Numbers' not in card() and not (tmp_path/'out'/'resnet18-online.png').exists()
    (run/'summary.json').write_text(json.dumps(dict(variant='sr', probe_trained=41.23456)))
    (run/'log.jsonl').write_text(''.join(json.dumps(dict(step=i, loss=1/i, loss_chance=1., lr=.1, images_per_s=5.)) + '\n' for i in (1, 2, 3)))
    for layout in possible('resnet18'): export_backbone(run, tmp_path/'out', layout)
    assert '| probe_trained | 41.23 |' in card() and '(resnet18-online.png)' in card()
    assert (tmp_path/'out'/'resnet18-online.png').read_bytes().startswith(b'\x89PNG')
    for path in (tmp_path/'out').iterdir():
        for part in (str(tmp_path), 'secret place', str(run)): assert part.encode() not in path.read_bytes(), path


def test_card_shows_code_that_works(make_run, tmp_path, monkeypatch):
    "The lines under Load run as they stand."
    export_backbone(make_run('resnet18', 8, 32), tmp_path, 'safetensors')
    monkeypatch.chdir(tmp_path)
    code = (tmp_path/'resnet18-online.md').read_text().split('```python\n')[1].split('```')[0]
    found = {}
    exec(code, found)
    assert torch.equal(found['backbone'].state_dict()['layer1.0.conv1.weight'], found['model'].state_dict()['layer1.0.conv1.weight'])
    with safe_open('resnet18-online.safetensors', 'pt') as f: assert f.metadata()['use'] == "pixcon.export.load_backbone('resnet18-online.safetensors')"


def test_a_run_that_trained(tmp_path, image):
    "From `fit` to a file; the run's own backbone.safetensors loads, too, and is the online one."
    run = Run(*configure(data='scenes', scenes=8, batch=4, epochs=1, size=32, hidden=16, dim=8, out=tmp_path/'run'))
    run.fit()
    ours = features(run.model.online.backbone.cpu(), image)
    for path in (export_backbone(run.out, tmp_path/'out'), run.out/'backbone.safetensors', run.out, run.out/'checkpoint.pt'):
        assert torch.equal(features(load_backbone(path, encoder='online'), image), ours)


def test_command_line(make_run, tmp_path):
    "`python -m pixcon.export` writes and tells; an error is one line, not a traceback."
    start = lambda *a: subprocess.run([sys.executable, '-m', 'pixcon.export', make_run('resnet18', 8, 32), *a], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                                      env={**os.environ, 'PYTHONPATH': str(ROOT)})
    done = start('out', '--layout', 'detectron2', '--encoder', 'target')
    assert done.returncode == 0 and 'left_at_random: layer3, layer4, fc' in done.stdout, done.stderr
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['resnet18-target-detectron2.pkl']
    wrong = start('elsewhere', '--layout', 'caffe')
    assert wrong.returncode == 1 and wrong.stderr.startswith('not exported: layout must be one of') and 'Traceback' not in wrong.stderr
    assert not (tmp_path/'elsewhere').exists()
