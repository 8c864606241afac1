"""Exported files in the libraries they are for: each line that a file carries is run as it stands.

`pip install '.[dev,frameworks]'` installs timm and the mm libraries; detectron2 is built from its repository.
A library that is absent skips its tests, unless PIXCON_FRAMEWORKS names it: then its absence is a failure."""
import importlib
import os
import shlex
import sys
from ast import literal_eval
from types import ModuleType
import pytest
import torch
from pixcon import export
from pixcon.augment import imagenet_mean, imagenet_std
from pixcon.export import export_backbone, load_backbone, read_weights
from test_export import RESNETS, features, image, make_run                 # noqa: F401

pytestmark = pytest.mark.filterwarnings('ignore')                  # the libraries have many of their own
REQUIRED = os.environ.get('PIXCON_FRAMEWORKS', '').split()


class Operators(ModuleType):
    "In place of compiled operators that are not there: no backbone here uses one, a call raises."
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        def absent(*args, **kwargs): raise NotImplementedError(f'{self.__name__}.{name} is not compiled')
        return absent


def compiled_or_not(package, name):
    "Puts a stand-in where a package lacks its compiled operators."
    try:
        importlib.import_module(f'{package}.{name}')
    except ImportError:
        sys.modules[f'{package}.{name}'] = Operators(f'{package}.{name}')
        setattr(importlib.import_module(package), name, sys.modules[f'{package}.{name}'])


def need(library, operators=None):
    "The library; skips the test, or fails it where the library is required."
    try:
        importlib.import_module(library)
        if operators:
            compiled_or_not(*operators)
    except Exception as e:                                         # an old library with a new one beneath it
        say = pytest.fail if library in REQUIRED else pytest.skip
        say(f'{library} is not here ({type(e).__name__}: {e})')


def use_of(path): return read_weights(path)[1]['use']


def apart(run, theirs, x):
    "Largest difference of two maps, as a fraction of our largest feature."
    ours = features(load_backbone(run), x)
    assert theirs.shape == ours.shape
    return ((theirs - ours).abs().max()/ours.abs().max()).item()


def as_ours(pixels): # (3,H,W) RGB from 0 to 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (imagenet_mean, imagenet_std))
    return (pixels/255 - mean)/std


@pytest.fixture
def noise():
    "An image as a library reads it from a file, RGB from 0 to 255."
    return torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0)).float()


# torchvision and timm

@pytest.mark.parametrize('name,stride', [('resnet18', 0), ('shufflenet_v2_x1_0', 8)])
def test_torchvision(make_run, tmp_path, image, monkeypatch, name, stride):
    "The lines leave the model, not the lists of keys, in their variable."
    run, found = make_run(name, stride), {}
    lines = use_of(export_backbone(run, tmp_path, 'torchvision'))
    monkeypatch.chdir(tmp_path)
    exec('import torch, torchvision\n' + lines, found)
    parts = [m for n, m in found['model'].named_children() if n in dict(load_backbone(run).named_children())]
    assert apart(run, features(torch.nn.Sequential(*parts), image), image) == 0


@pytest.mark.parametrize('name,stride,size,index', [
    ('resnet50', 16, 64, 3), ('convnext_atto', 8, 32, 1)])
def test_timm(make_run, tmp_path, monkeypatch, name, stride, size, index):
    "The whole model and its feature extractor, from one file."
    need('timm')
    run, found, x = make_run(name, stride, size), {}, torch.randn(1, 3, size, size)
    lines = use_of(export_backbone(run, tmp_path, 'timm'))
    monkeypatch.chdir(tmp_path)
    exec('import timm, torch\n' + lines, found)
    model, extractor = found['model'].eval(), found['features'].eval()
    with torch.no_grad():
        whole = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
        assert apart(run, whole, x) == 0 and apart(run, extractor(x)[0], x) == 0


@pytest.mark.parametrize('name,stride,size', [
    ('convnext_atto', 8, 32),
    pytest.param('swin_tiny_patch4_window7_224', 16, 224, marks=pytest.mark.skipif(
        'timm' not in REQUIRED, reason='16 s: only where PIXCON_FRAMEWORKS names timm'))])
def test_timm_features(make_run, tmp_path, monkeypatch, name, stride, size):
    "timm's own strict checkpoint_path takes the file under the extractor's names, and it comes back."
    need('timm')
    run, found, x = make_run(name, stride, size), {}, torch.randn(1, 3, size, size)
    path = export_backbone(run, tmp_path, 'timm-features')
    monkeypatch.chdir(tmp_path)
    exec('import timm\n' + use_of(path), found)
    with torch.no_grad():
        theirs = found['features'].eval()(x)[0]                    # Swin's with its channels last
        theirs = theirs.permute(0, 3, 1, 2) if 'swin' in name else theirs
        assert apart(run, theirs, x) == 0
    assert torch.equal(features(load_backbone(path), x), features(load_backbone(run), x))
    assert read_weights(path)[1]['left_at_random'] == 'nothing'


# detectron2, mm: what can be said without them

@pytest.mark.parametrize('name', RESNETS)
def test_lines_can_be_read(name):
    "Words for detectron2 come in pairs, lists are one word; lines for mm are Python."
    words = shlex.split(export._use(name, 'detectron2', 'a file.pkl'))
    settings = dict(zip(words[::2], words[1::2], strict=True))
    assert settings['MODEL.WEIGHTS'] == 'a file.pkl' and len(literal_eval(settings['MODEL.PIXEL_MEAN'])) == 3
    use = export._use(name, 'mm', 'file.pth')
    for library in MM if 'wide' not in name else ['mmpretrain']:
        found = {}
        exec(mm_lines(use, library), found)
        assert ('pretrained' in found['model']) == (library == 'mmsegmentation')
        width = {'mmpretrain': 'width_per_group'}.get(library, 'base_width')
        assert (width in found['model']['backbone']) == ('x' in name)


# detectron2

DETECTRON2 = 'detectron2', ('detectron2', '_C')


def detectron2_settings(words):
    "A configuration as its command line makes it."
    from detectron2.config import get_cfg
    settings = get_cfg()
    settings.merge_from_list(words + ['MODEL.DEVICE', 'cpu'])
    return settings


@pytest.mark.parametrize('name,stride', [
    ('resnet18', 0), ('resnet50', 16), ('resnext50_32x4d', 0), ('wide_resnet50_2', 0)])
def test_detectron2(make_run, tmp_path, image, monkeypatch, name, stride):
    "As a shell cuts the words, read by its own checkpointer into its own ResNet."
    need(*DETECTRON2)
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_backbone
    run, last = make_run(name, stride), 'res4' if stride else 'res5'
    words = shlex.split(use_of(export_backbone(run, tmp_path, 'detectron2')))
    settings = detectron2_settings([*words, 'MODEL.RESNETS.OUT_FEATURES', str([last])])
    net = build_backbone(settings)
    monkeypatch.chdir(tmp_path)
    DetectionCheckpointer(net).load(settings.MODEL.WEIGHTS)
    assert apart(run, features(net, image)[last], image) <= 1e-6


def test_detectron2_mask_rcnn(make_run, tmp_path, image, noise, monkeypatch):
    "The whole Mask R-CNN with FPN of its model zoo, with the pixels as we give them to the backbone."
    need(*DETECTRON2)
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model
    run = make_run('resnet50')
    words = shlex.split(use_of(export_backbone(run, tmp_path, 'detectron2')))
    settings = detectron2_settings([])
    settings.merge_from_file(model_zoo.get_config_file('COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml'))
    settings.merge_from_list(words)
    model = build_model(settings)
    monkeypatch.chdir(tmp_path)
    DetectionCheckpointer(model).load(settings.MODEL.WEIGHTS)
    assert apart(run, features(model.backbone.bottom_up, image)['res5'], image) <= 1e-6
    assert model.input_format == 'RGB'
    assert (model.preprocess_image([dict(image=noise)]).tensor[0] - as_ours(noise)).abs().max() < 1e-4


# mmpretrain, mmsegmentation, mmdetection

MM = dict(                                                         # package, configuration it ships
    mmpretrain=('mmpretrain', {'resnet50': 'resnet50', 'resnext50_32x4d': 'resnext50_32x4d',
                               'wide_resnet50_2': 'wide-resnet50'}),
    mmsegmentation=('mmseg', {'resnet50': 'upernet_r50', 'resnext50_32x4d': 'upernet_r50'}),
    mmdetection=('mmdet', {'resnet50': 'faster-rcnn_r50_fpn', 'resnext50_32x4d': 'faster-rcnn_r50_fpn'}))
CASES = [(library, name) for library, (_, bases) in MM.items() for name in bases]


def mm_lines(use, library):
    "The lines that a file carries for one of the libraries."
    parts = dict(part.split('\n', 1) for part in use.removeprefix('# ').split('\n# ') if '\n' in part)
    return parts[library]


def mm_model(package, base, lines, folder):
    "The whole model of a configuration that begins with one of the library's own."
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    library = importlib.import_module(package)
    importlib.import_module(f'{package}.models')
    (folder/'config.py').write_text(
        f"_base_ = ['{library.__path__[0]}/.mim/configs/_base_/models/{base}.py']\n{lines}\n")
    config = Config.fromfile(folder/'config.py')
    config.model.setdefault('data_preprocessor', config.get('data_preprocessor'))  # as its train tool does
    with DefaultScope.overwrite_default_scope(package):
        model = importlib.import_module(f'{package}.registry').MODELS.build(config.model)
        model.init_weights()
    model.eval()                                                   # mmpretrain's gives None
    return model


def need_mm(package):
    need('mmengine')
    need('mmcv', ('mmcv', '_ext'))                                 # mmcv-lite has none
    need(package)


@pytest.mark.parametrize('library,name', CASES)
def test_mm(make_run, tmp_path, image, noise, monkeypatch, library, name):
    "The lines at the end of a configuration of the library: all tensors, features, pixels."
    package, bases = MM[library]
    need_mm(package)
    run = make_run(name)
    lines = mm_lines(use_of(export_backbone(run, tmp_path, 'mm')), library)
    monkeypatch.chdir(tmp_path)
    model = mm_model(package, bases[name], lines, tmp_path)
    theirs, ours = model.backbone.state_dict(), load_backbone(run).state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], t) for n, t in ours.items())
    assert apart(run, features(model.backbone, image)[-1], image) <= 1e-6
    blue_first = dict(inputs=[noise.flip(0).byte()], data_samples=None)
    pixels = model.data_preprocessor(blue_first, training=False)['inputs'][0][:, :64, :96]
    assert (pixels - as_ours(noise)).abs().max() < 1e-4


def test_mm_dilated(make_run, tmp_path, monkeypatch):
    "A base that names other pre-trained weights and another stem, as most of mmsegmentation's do."
    need_mm('mmseg')
    run = make_run('resnet50', 16)
    lines = mm_lines(use_of(export_backbone(run, tmp_path, 'mm')), 'mmsegmentation')
    monkeypatch.chdir(tmp_path)
    theirs = mm_model('mmseg', 'fcn_r50-d8', lines, tmp_path).backbone.state_dict()
    assert all(torch.equal(theirs[n], t) for n, t in load_backbone(run).state_dict().items())
