"""Weights out and back: every layout is checked by loading it, and what is wrong is refused before it has a name."""
import json
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from pixcon import export
from pixcon.export import (export_backbone, from_detectron2, layouts, load_backbone, read_weights,
                           to_detectron2)
from pixcon.training import Pretraining, configure

ROOT = Path(__file__).parent.parent
ALL = ('torchvision', 'timm', 'detectron2', 'mm', 'safetensors')
FACTS = {'encoder', 'backbone', 'stride', 'step', 'variant', 'config', 'layout', 'library', 'map',
         'left_at_random', 'input', 'licence', 'use', 'checked'}
RESNETS = [n for n in torchvision.models.list_models(module=torchvision.models)
           if torchvision.models.get_model_builder(n).__module__.endswith('.resnet')]
CHECKPOINT = 'checkpoint.pt'                                       # of a run folder


def tiny_run(out, **given):
    "Trains two steps, in float32 unless told otherwise; returns the run folder."
    small = dict(data='scenes', scenes=4, batch=2, epochs=1, size=64, hidden=8, dim=4, queue=4, amp='off')
    Pretraining(*configure(**small | given, out=str(out))).fit()
    return Path(out)


def change_weights(run, out, change):
    "Writes a run's checkpoint to a folder, after a function has changed the tensors of its model in place."
    saved = torch.load(run/CHECKPOINT, weights_only=True)
    change(saved['model'])
    torch.save(saved, out/CHECKPOINT)


@torch.no_grad()
def unsettle(state):
    "Statistics and scales as after long training, so that a tensor that is left out shows."
    for n, t in state.items():
        if '.backbone.' not in f'.{n}':
            continue
        if n.endswith('num_batches_tracked'):
            t.fill_(7)
        elif t.ndim == 1 and t.is_floating_point():
            t.normal_(0, .1) if 'mean' in n or 'bias' in n else t.uniform_(.5, 1.5)


@pytest.fixture(scope='module')
def make_run(tmp_path_factory):
    "A function that gives the folder of a run with two different encoders, one for each set of parameters."
    made = {}
    def make(backbone='resnet18', stride=0, size=64, data='scenes'):
        key = backbone, stride, size, data
        if key not in made:
            out = tmp_path_factory.mktemp('run')
            made[key] = tiny_run(out, backbone=backbone, stride=stride, size=size, data=data)
            change_weights(out, out, unsettle)
        return made[key]
    return make


@pytest.fixture
def image():
    "One image, larger than those of the checks."
    return torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(net, x):
    net.eval()                                                     # mmpretrain's gives None
    return net(x)


# Out, and into the other libraries

@pytest.mark.parametrize('name,stride,size,left', [
    ('resnet18', 0, 64, 'fc'),
    ('resnet50', 0, 64, 'fc'),
    ('resnet18', 8, 32, 'layer3, layer4, fc'),
    ('resnet50', 16, 64, 'layer4, fc'),
    ('shufflenet_v2_x1_0', 8, 32, 'stage3, stage4, conv5, fc'),
    ('convnext_tiny', 8, 32, 'features.4, features.5, features.6, features.7, classifier'),
    ('swin_t', 0, 64, 'head')])
def test_round_trip(make_run, tmp_path, image, name, stride, size, left):
    "Every layout that a network has gives back the same tensors and features, and says what it leaves out."
    run = make_run(name, stride, size)
    ours = load_backbone(run)
    assert layouts(name) == (ALL if name in RESNETS else ('torchvision', 'safetensors'))
    for layout in layouts(name):
        path = export_backbone(run, tmp_path, layout)
        about, again = read_weights(path)[1], load_backbone(path)
        assert FACTS <= set(about) and all(isinstance(v, str) for v in about.values())
        assert (about['encoder'], about['layout'], about['backbone']) == ('online', layout, name)
        assert about['left_at_random'] == left
        for (n, a), b in zip(again.state_dict().items(), ours.state_dict().values()):
            assert torch.equal(a, b), n
        assert torch.equal(features(again, image), features(ours, image))
    assert not [p for p in tmp_path.iterdir() if 'part' in p.name]


@pytest.mark.parametrize('name,stride,size', [
    ('resnet26', 0, 64), ('convnext_atto', 8, 32), ('vit_tiny_patch16_224', 0, 224)])
def test_timm_models(make_run, tmp_path, name, stride, size):
    "A backbone from timm goes out under timm's names and loads into timm's whole model."
    run = make_run(name, stride, size)
    assert layouts(name) == ('timm', 'safetensors')
    x, ours = torch.randn(1, 3, size, size), load_backbone(run)
    for layout in layouts(name):
        path = export_backbone(run, tmp_path, layout)
        whole = timm.create_model(name)
        assert set(read_weights(path)[0]) <= set(whole.state_dict())
        assert torch.equal(features(load_backbone(path), x), features(ours, x))
    message = 'torchvision has no .*possible layouts for it: timm, safetensors'
    with pytest.raises(ValueError, match=message):
        export_backbone(run, tmp_path, 'torchvision')


@pytest.mark.parametrize('name,stride', [('resnet18', 0), ('resnet50', 0), ('resnet50', 16)])
def test_torchvision_loads_it(make_run, tmp_path, image, name, stride):
    "The way its users do; what the file does not bring keeps the values it had."
    run = make_run(name, stride)
    path = export_backbone(run, tmp_path, 'torchvision')
    whole = torchvision.models.get_model(name)
    before = {n: t.clone() for n, t in whole.state_dict().items()}
    loaded = whole.load_state_dict(torch.load(path, weights_only=True), strict=False)
    left = {'fc'} if not stride else {'layer4', 'fc'}
    assert not loaded.unexpected_keys
    assert {n.split('.')[0] for n in loaded.missing_keys} == left
    untouched = {n: t for n, t in whole.state_dict().items() if n.split('.')[0] in left}
    assert all(torch.equal(t, before[n]) for n, t in untouched.items())
    stages = nn.Sequential(*list(whole.children())[:-2 if not stride else -3])
    assert torch.equal(features(stages, image), features(load_backbone(run), image))


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_timm_loads_it(make_run, tmp_path, image, name):
    "timm's model without classifier takes the file strictly."
    run = make_run(name)
    whole = timm.create_model(name, num_classes=0)
    path = export_backbone(run, tmp_path, 'timm')
    whole.load_state_dict(torch.load(path, weights_only=True), strict=True)
    theirs = whole.eval().forward_features(image)
    assert torch.equal(theirs, features(load_backbone(run), image))


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
        if o == middle:
            sizes, strided = [(i, middle, 3), (middle, o, 3)], 0
        else:
            sizes, strided = [(i, middle, 1), (middle, middle, 3), (middle, o, 1)], 1
        for k, (a, b, size) in enumerate(sizes):
            self.add_module(f'conv{k+1}', Conv(a, b, size, stride if k == strided else 1))
        self.n = len(sizes)
        self.shortcut = Conv(i, o, 1, stride) if i != o else None
    def forward(self, x):
        y = x
        for k in range(self.n):
            y = getattr(self, f'conv{k+1}')(y)
            if k < self.n - 1:
                y = F.relu(y)
        return F.relu(y + (self.shortcut(x) if self.shortcut else x))


class DetectronNet(nn.Module):
    "A ResNet with the module tree that detectron2 documents: stem.conv1, res2 to res5."
    def __init__(self, blocks, wide): # blocks in each stage, channels out over channels inside
        super().__init__()
        self.stem, i = nn.Module(), 64
        self.stem.conv1 = Conv(3, 64, 7, 2)
        for s, n in enumerate(blocks):
            middle, stage = 64*2**s, []
            for k in range(n):
                stage.append(Block(i, middle, middle*wide, 2 if s and k == 0 else 1))
                i = middle*wide
            self.add_module(f'res{s+2}', nn.Sequential(*stage))
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        for s in range(2, 6):
            x = getattr(self, f'res{s}', nn.Identity())(x)
        return x


@pytest.mark.parametrize('name,stride,blocks,wide', [
    ('resnet18', 0, (2, 2, 2, 2), 1), ('resnet50', 0, (3, 4, 6, 3), 4), ('resnet50', 16, (3, 4, 6), 4)])
def test_detectron2_loads_it(make_run, tmp_path, image, name, stride, blocks, wide):
    "Read as detectron2 reads it, into a network with its names, strictly: the same features."
    run = make_run(name, stride)
    path = export_backbone(run, tmp_path, 'detectron2')
    with open(path, 'rb') as f:
        saved = pickle.load(f, encoding='latin1')
    assert saved['matching_heuristics'] is True and saved['__author__'] == 'pixcon'
    assert all(type(x) is np.ndarray and x.flags.writeable for x in saved['model'].values())
    net = DetectronNet(blocks, wide)
    net.load_state_dict({n: torch.from_numpy(x) for n, x in saved['model'].items()}, strict=True)
    ours, theirs = features(load_backbone(run), image), features(net, image)
    assert (theirs - ours).abs().max() <= 1e-6*ours.abs().max()
    watched = ('numpy', 'ndarray', 'numpy._core.multiarray', '_reconstruct')
    words = {argument for op, argument, _ in pickletools.genops(path.read_bytes())
             if op.name in ('SHORT_BINUNICODE', 'BINUNICODE')}
    assert words & set(watched) == {'numpy', 'ndarray'}


def test_mm_loads_it(make_run, tmp_path):
    "state_dict under `backbone.`, in torchvision's names behind it, all of them and no others."
    saved = torch.load(export_backbone(make_run('resnet50'), tmp_path, 'mm'), weights_only=True)
    assert set(saved) == {'state_dict', 'meta'}
    assert all(n.startswith('backbone.') for n in saved['state_dict'])
    names = torchvision.models.resnet50().state_dict()
    wanted = {n for n in names if not n.startswith('fc.')}
    assert {n.removeprefix('backbone.') for n in saved['state_dict']} == wanted
    assert saved['meta']['pixcon']['encoder'] == 'online'


@pytest.mark.filterwarnings('ignore')                              # mmpretrain 1.2.0 has many of its own
@pytest.mark.parametrize('name,stride', [
    ('resnet18', 0), ('resnet50', 16), ('resnext50_32x4d', 0), ('wide_resnet50_2', 0)])
def test_mmpretrain_builds_it(make_run, tmp_path, image, monkeypatch, name, stride):
    "From the line that the file carries, where mmpretrain is installed: the same features."
    models = pytest.importorskip('mmpretrain.models')
    run = make_run(name, stride)
    use = read_weights(export_backbone(run, tmp_path, 'mm'))[1]['use']
    monkeypatch.chdir(tmp_path)
    settings = eval(f'dict({use})')                                # as it stands in a configuration
    last = 2 if stride else 3                                      # the stage that our map comes from
    net = models.build_backbone(settings['backbone'] | dict(out_indices=(last,)))
    net.init_weights()
    ours, (theirs,) = features(load_backbone(run), image), features(net, image)
    assert (theirs - ours).abs().max() <= 1e-6*ours.abs().max()


# Names

@pytest.mark.parametrize('name', RESNETS)
def test_names_of_all_resnets(name):
    "torchvision's names and shapes are timm's; each has a detectron2 name of its own, and the way back leads back."
    with torch.device('meta'):
        whole = torchvision.models.get_model(name)
    ours = {n: t.shape for n, t in whole.state_dict().items()}
    theirs = {to_detectron2(n) for n in ours}
    assert len(theirs) == len(ours)
    assert all(from_detectron2(to_detectron2(n)) == n for n in ours)
    assert {n.split('.')[0] for n in theirs} == {'stem', 'res2', 'res3', 'res4', 'res5'}
    assert not any(w in n for n in theirs for w in ('layer', 'bn', 'downsample'))
    with torch.device('meta'):
        whole = timm.create_model(name)
    assert ours == {n: t.shape for n, t in whole.state_dict().items()}


@pytest.mark.parametrize('name', [
    'proposal_generator.rpn_head.conv.weight', 'roi_heads.res5.0.conv1.norm.weight', 'res9.0.conv1.weight',
    'resnet.norm.weight', 'a', 'a.b', ''])
def test_foreign_names_stay(name):
    "What is no tensor of a ResNet goes through, so that the check can list it."
    assert from_detectron2(name) == name


# What is wrong is refused

CONVOLUTIONS = 'layer1.0.conv1.weight', 'layer1.1.conv2.weight'
A, B = CONVOLUTIONS
FAULTS = dict(
    scaled=lambda s: {**s, A: s[A]*1.00001},
    swapped=lambda s: {**s, A: s[B], B: s[A]},
    dropped=lambda s: {n: t for n, t in s.items() if n != A},
    counter=lambda s: {n: t for n, t in s.items() if n != 'bn1.num_batches_tracked'},
    renamed=lambda s: {n.replace('layer1.0.conv1', 'layer1.0.conv7'): t for n, t in s.items()},
    nan=lambda s: {**s, A: s[A]*torch.nan},
    shape=lambda s: {**s, A: s[A][:-1].clone()},
    extra=lambda s: {**s, 'fc.weight': torch.zeros(1000, 512)},
    cut=lambda s: s)
MESSAGES = dict(
    scaled='differ from ours by',
    swapped='differ from ours by',
    dropped=r'1 missing \(layer1.0.conv1.weight\)',
    counter='1 missing .bn1.num_batches_tracked',
    renamed=r'1 missing \(layer1.0.conv1.weight\); 1 unexpected \(layer1.0.conv7.weight\)',
    nan='not finite',
    shape='1 of another shape',
    extra=r'1 unexpected \(fc.weight\)',
    cut='truncated')
CASES = [('detectron2', how) for how in MESSAGES]
CASES += [(n, how) for n in ALL if n != 'detectron2' for how in ('swapped', 'dropped', 'cut')]


def spoilt(how):
    "A writer with a fault in what it writes."
    write = export.write_weights
    def spoil(path, state, layout, about):
        write(path, FAULTS[how](state), layout, about)
        if how == 'cut':
            path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    return spoil


@pytest.mark.parametrize('layout,how', CASES)
def test_refuses_what_is_wrong(make_run, tmp_path, monkeypatch, layout, how):
    "A fault in one tensor of the written file: an error, and nothing on the disk."
    monkeypatch.setattr(export, 'write_weights', spoilt(how))
    with pytest.raises(ValueError, match=MESSAGES[how]):
        export_backbone(make_run('resnet18'), tmp_path/'out', layout)
    assert not (tmp_path/'out').exists()


def test_a_refused_export_leaves_the_older_file(make_run, tmp_path, monkeypatch):
    "And a slip in the rule for names is caught even though every name fits."
    path = export_backbone(make_run('resnet18'), tmp_path, 'detectron2')
    before = path.read_bytes()
    slip = {A: 'res2.1.conv2.weight', B: 'res2.0.conv1.weight'}
    monkeypatch.setattr(export, 'to_detectron2', lambda n: slip.get(n, to_detectron2(n)))
    with pytest.raises(ValueError, match='differ from ours by'):
        export_backbone(make_run('resnet18'), tmp_path, 'detectron2', encoder='online')
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_refuses_a_run_that_diverged(make_run, tmp_path):
    "NaN in a weight of the run itself."
    def spoil(state): state['online.backbone.conv1.weight'][0] = torch.nan
    change_weights(make_run('resnet18'), tmp_path, spoil)
    with pytest.raises(ValueError, match='not finite'):
        export_backbone(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert export_backbone(tmp_path, tmp_path/'out', encoder='target').exists()


@pytest.mark.parametrize('layout', ALL)
def test_online_and_target(make_run, tmp_path, image, layout):
    "Two files side by side, each with its own weights and its own word in the metadata."
    run, found = make_run('resnet18'), {}
    for encoder, other in (('online', 'target'), ('target', 'online')):
        path = export_backbone(run, tmp_path, layout, encoder)
        assert read_weights(path)[1]['encoder'] == encoder
        found[encoder] = features(load_backbone(path, encoder=encoder), image)
        assert torch.equal(found[encoder], features(load_backbone(run, encoder=encoder), image))
        with pytest.raises(ValueError, match=f"holds the encoder '{encoder}'"):
            load_backbone(path, encoder=other)
    assert not torch.allclose(found['online'], found['target'])


@pytest.mark.parametrize('layout', ALL)
@pytest.mark.parametrize('keep', [0., .001, .5, .999])
def test_truncated_file(make_run, tmp_path, layout, keep):
    "Cut anywhere, it is said to be truncated."
    path = export_backbone(make_run('resnet18', 8, 32), tmp_path, layout)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(keep*len(whole))])
    with pytest.raises(ValueError, match='truncated or not a checkpoint'):
        load_backbone(path)


@pytest.mark.parametrize('keep', [0., .5, .999])
def test_truncated_run(make_run, tmp_path, keep):
    "A checkpoint that was cut off."
    whole = (make_run('resnet18', 8, 32)/CHECKPOINT).read_bytes()
    (tmp_path/CHECKPOINT).write_bytes(whole[:int(keep*len(whole))])
    with pytest.raises(ValueError, match='truncated or not a checkpoint'):
        export_backbone(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_another_network(tmp_path):
    "Names are listed, the first few and how many; a file that says nothing must be told what it is."
    path = tmp_path/'r34.pth'
    torch.save(torchvision.models.resnet34().state_dict(), path)
    with pytest.raises(ValueError, match="does not say which network"):
        load_backbone(path)
    listed = (r'98 unexpected \(fc.bias, fc.weight, layer1.2.bn1.bias, '
              r'layer1.2.bn1.num_batches_tracked and 94 more\)')
    with pytest.raises(ValueError, match=listed):
        load_backbone(path, 'resnet18')
    with pytest.raises(ValueError, match=r'of 318 tensors .*missing.*unexpected.*of another shape'):
        load_backbone(path, 'resnet50')


def test_foreign_files(tmp_path, make_run):
    "Somebody else's checkpoint, a file without tensors, a file of another kind, none at all."
    torch.save(dict(state_dict={'module.encoder_q.conv1.weight': torch.zeros(2)}), tmp_path/'moco.pth')
    with pytest.raises(ValueError, match=r'120 missing .* 1 unexpected \(module.encoder_q.conv1.weight\)'):
        load_backbone(tmp_path/'moco.pth', 'resnet18')
    torch.save(dict(epoch=3), tmp_path/'other.pth')
    with pytest.raises(ValueError, match='no tensors: epoch'):
        load_backbone(tmp_path/'other.pth', 'resnet18')
    torch.save(dict(epoch=3), tmp_path/CHECKPOINT)
    with pytest.raises(ValueError, match='no checkpoint of a run: it has no config, step, model'):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match='files of type'):
        load_backbone(make_run('resnet18')/'config.json')
    with pytest.raises(FileNotFoundError, match='there is no file'):
        load_backbone(tmp_path/'none.pth')
    with pytest.raises(FileNotFoundError, match='is no run folder'):
        load_backbone(ROOT)


def test_a_plain_state_dict_of_ones_own(tmp_path, image):
    "Named by hand and cut by hand, it loads."
    net = torchvision.models.resnet18()
    unsettle({f'backbone.{n}': t for n, t in net.state_dict().items()})
    stages = ('conv1', 'bn1', 'layer1', 'layer2')
    kept = {n: t for n, t in net.state_dict().items() if n.split('.')[0] in stages}
    torch.save(kept, tmp_path/'mine.pt')
    expected = features(nn.Sequential(*list(net.children())[:6]), image)
    assert torch.equal(features(load_backbone(tmp_path/'mine.pt', 'resnet18', 8), image), expected)


sprung = []


def spring(): sprung.append(1)


class Trap:
    "Calls a function when it is unpickled freely."
    def __reduce__(self): return spring, ()


@pytest.mark.parametrize('file', ['trap.pkl', 'trap.pth', CHECKPOINT])
def test_no_code_runs_while_reading(tmp_path, file):
    "A pickle that asks for anything but numbers is refused, by name."
    sprung.clear()
    if file == 'trap.pkl':
        (tmp_path/file).write_bytes(pickle.dumps(dict(model=dict(a=Trap()), about={})))
    else:
        torch.save(dict(model=Trap(), config={}, step=1), tmp_path/file)
    with pytest.raises(ValueError, match='it asks for .*spring'):
        load_backbone(tmp_path/file, 'resnet18')
    assert not sprung
    pickle.loads(pickle.dumps(Trap()))
    assert sprung


def test_arrays_of_objects_are_refused(tmp_path):
    "numpy.ndarray is the one call a .pkl may make, and only for numbers."
    class Objects:
        def __reduce__(self): return np.ndarray, ((1,), '|O', bytearray(8))
    (tmp_path/'o.pkl').write_bytes(pickle.dumps(dict(model=dict(a=Objects())), 4))
    with pytest.raises(ValueError, match="not of numbers"):
        load_backbone(tmp_path/'o.pkl', 'resnet18')


class Zeros:
    def __reduce__(self): return bytearray, (6*10**9,)


class Blank:
    def __reduce__(self): return np.ndarray, ((6*10**9,), '|u1')


HOSTILE = {'memo': b'K\x01r\xff\xff\xff\x3f.', 'length': b'\x80\x04\x8e' + (6*10**9).to_bytes(8, 'little') + b'.',
           'zeros': pickle.dumps(Zeros(), 4), 'blank': pickle.dumps(Blank(), 4), 'cut': pickle.dumps(list(range(99)), 4)[:-9]}
UNDER_A_LIMIT = '''
import resource, sys, time
from pixcon.export import load_backbone
size = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28,)*2)
for path in sys.argv[1:]:
    begun = time.time()
    try: load_backbone(path, 'resnet18')
    except (ValueError, TypeError) as e: print(type(e).__name__, e, time.time() - begun < 2)
'''


def test_a_few_bytes_that_ask_for_much(tmp_path):
    "Refused at once, in 256 MB, with the file's name."
    for name, content in HOSTILE.items(): (tmp_path/f'{name}.pkl').write_bytes(content)
    paths = [str(tmp_path/f'{name}.pkl') for name in HOSTILE]
    child = subprocess.run([sys.executable, '-c', UNDER_A_LIMIT, *paths], capture_output=True, text=True, timeout=100)
    said = child.stdout.splitlines()
    assert child.returncode == 0 and len(said) == len(HOSTILE), child.stdout + child.stderr[-2000:]
    assert 'MemoryError' not in child.stdout
    for line, path in zip(said, paths): assert line.startswith('ValueError') and path in line and line.endswith('True'), line


def test_layouts_that_there_are_not(make_run, tmp_path):
    "The error says which are possible."
    run = make_run('shufflenet_v2_x1_0', 8, 32)
    for layout in ('timm', 'detectron2', 'mm'):
        message = f'{layout} has no shufflenet_v2_x1_0; possible layouts for it: torchvision, safetensors'
        with pytest.raises(ValueError, match=message):
            export_backbone(run, tmp_path/'out', layout)
    with pytest.raises(ValueError, match="layout must be one of torchvision, timm, .* got 'caffe'"):
        export_backbone(run, tmp_path/'out', 'caffe')
    with pytest.raises(ValueError, match="'online' or 'target', got 'ema'"):
        export_backbone(run, tmp_path/'out', encoder='ema')
    assert not (tmp_path/'out').exists()


# The card

def test_card_and_privacy(make_run, tmp_path):
    "The card names data, encoder, use and numbers; no file gives away a folder of the machine."
    photos = tmp_path/'secret place'/'photos'
    photos.mkdir(parents=True)
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos/f'{i}.jpg')
    run, out = make_run('resnet18', 8, 32, str(photos)), tmp_path/'out'
    (run/'log.jsonl').unlink(missing_ok=True)
    card = lambda: (out/'resnet18-online.md').read_text()
    export_backbone(run, out, 'safetensors', licence='cc-by-4.0')
    for text in ('license: cc-by-4.0', 'Unlabelled images from photos.', '| encoder | online |',
                 '| left at random | layer3, layer4, fc |',
                 "load_backbone('resnet18-online.safetensors')", '| tau | 0.2 |'):
        assert text in card()
    assert '## Curves' not in card() and '## Numbers' not in card()
    assert not (out/'resnet18-online.png').exists()
    (run/'summary.json').write_text(json.dumps(dict(variant='sr', probe_trained=41.23456)))
    lines = [dict(step=i, loss=1/i, loss_uninformed=1., lr=.1, images_per_s=5.) for i in (1, 2, 3)]
    (run/'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    for layout in layouts('resnet18'):
        export_backbone(run, out, layout)
    assert '| probe_trained | 41.23 |' in card() and '(resnet18-online.png)' in card()
    assert (out/'resnet18-online.png').read_bytes().startswith(b'\x89PNG')
    for path in out.iterdir():
        for part in (str(tmp_path), 'secret place', str(run)):
            assert part.encode() not in path.read_bytes(), path


def test_card_shows_code_that_works(make_run, tmp_path, monkeypatch):
    "The lines under Load run as they stand."
    export_backbone(make_run('resnet18', 8, 32), tmp_path, 'safetensors')
    monkeypatch.chdir(tmp_path)
    code = (tmp_path/'resnet18-online.md').read_text().split('```python\n')[1].split('```')[0]
    found = {}
    exec(code, found)
    assert torch.equal(found['backbone'].state_dict()[A], found['model'].state_dict()[A])
    with safe_open('resnet18-online.safetensors', 'pt') as f:
        assert f.metadata()['use'] == "pixcon.export.load_backbone('resnet18-online.safetensors')"


# From a run to a file

@pytest.mark.parametrize('amp', ['off', 'bf16'])
def test_a_run_that_trained(tmp_path, image, amp):
    """The run folder, its checkpoint, its own backbone.safetensors and an export are the same online
    encoder, bit for bit, whatever the precision and the order in memory that the run trained in."""
    run = tiny_run(tmp_path/'run', scenes=8, batch=4, size=32, hidden=16, dim=8, queue=8, amp=amp)
    ours = features(load_backbone(run/'backbone.safetensors'), image)
    for path in (export_backbone(run, tmp_path/'out'), run, run/CHECKPOINT):
        assert torch.equal(features(load_backbone(path, encoder='online'), image), ours)
    for t in load_backbone(run).state_dict().values():
        assert t.is_contiguous() and t.dtype in (torch.float32, torch.int64)


def test_a_bf16_run_goes_out_in_every_layout(tmp_path, image):
    "Its weights are float32; only while training they lie with their channels last."
    run = tiny_run(tmp_path/'run', backbone='resnet18', stride=8, size=32, amp='bf16')
    ours = features(load_backbone(run), image)
    for layout in layouts('resnet18'):
        path = export_backbone(run, tmp_path/'out', layout)
        assert torch.equal(features(load_backbone(path), image), ours)


def test_command_line(make_run, tmp_path):
    "`python -m pixcon.export` writes and tells; an error is one line, not a traceback."
    def start(*words):
        command = [sys.executable, '-m', 'pixcon.export', make_run('resnet18', 8, 32), *words]
        env = {**os.environ, 'PYTHONPATH': str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env)
    done = start('out', '--layout', 'detectron2', '--encoder', 'target')
    assert done.returncode == 0 and 'left_at_random: layer3, layer4, fc' in done.stdout, done.stderr
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['resnet18-target-detectron2.pkl']
    wrong = start('elsewhere', '--layout', 'caffe')
    assert wrong.returncode == 1 and 'Traceback' not in wrong.stderr
    assert wrong.stderr.startswith('not exported: layout must be one of')
    assert not (tmp_path/'elsewhere').exists()
