"""Fine-tuning: image and label stay together, what is ignored changes nothing, runs resume exactly, the notebook as a user runs it."""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pixcon import segment as room
from pixcon.augment import imagenet_mean
from pixcon.config import check
from pixcon.encoder import feature_shape, make_backbone
from pixcon.labelled import LabelledScenes, open_labelled
from pixcon.run import FORMAT, make_optimizer, read_lines, read_log
from pixcon.segment import (SEGMENT_RECIPES, Augmented, SegmentConfig, Segmenter, SharedDropout, batches,
                            configure_segment, evaluate, fine_tune, load_backbone, make_segmenter, paint,
                            parameter_groups, poly, predict, segment_config,
                            segmentation_backbone, segmentation_loss, share_dropout, train_step)

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get('PIXCON_KILLS', 3))
moderate = settings(max_examples=40, deadline=None, derandomize=True)
tiny = dict(batch=2, iterations=4, labelled=4, test=3, crop_height=32, crop_width=40, short=32)


def config(out='', **given):
    "Parameters for the built-in scenes in float32, so that numbers do not depend on the machine."
    return segment_config('scenes', **{'amp': 'off', **given}, out=out)


def network(classes=12, seed=0):
    "A small network that reads 4x4 pixels per cell."
    torch.manual_seed(seed)
    return Segmenter(nn.Sequential(nn.Conv2d(3, 32, 4, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU()), classes)


CODES = {0: (0, 0, 0), 1: (240, 0, 0), 2: (0, 240, 0), 3: (0, 0, 240), 255: (240, 240, 240)}  # no mixture of some of them is another
FILL = [round(255*m) for m in imagenet_mean]


def blocks(h, w, side, seed):
    "A label of square blocks of classes 0 to 3 and 255, and an image whose colours encode it."
    coarse = np.random.default_rng(seed).choice(list(CODES), (-(-h//side), -(-w//side)))
    label = torch.from_numpy(coarse.repeat(side, 0).repeat(side, 1)[:h, :w].astype(np.int64))
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    for c, colour in CODES.items():
        image[:, label == c] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    return image, label


def decoded(image):
    "Class that the colours encode, -1 for a mixture, and where the image was filled."
    codes = torch.tensor(list(CODES.values()))[:, :, None, None]
    distance = (image.int() - codes).abs().amax(1)                 # (5,h,w)
    nearest = distance.min(0)
    label = torch.where(nearest.values <= 6, torch.tensor(list(CODES))[nearest.indices], -1)
    return label, (image.int() == torch.tensor(FILL)[:, None, None]).all(0)


sizes = st.integers(8, 60)


@moderate
@given(h=st.integers(9, 70), w=st.integers(9, 70), crop=st.tuples(sizes, sizes), short=st.integers(8, 80),
       low=st.floats(.4, 1), more=st.floats(1, 2.5), seed=st.integers(0, 10_000))
def test_label_stays_with_its_image(h, w, crop, short, low, more, seed):
    "Any size, scale, crop and flip: wherever the colour is a class's code, that class is the label of this pixel or of a neighbour's."
    c = config(short=short, scale_low=low, scale_high=low*more, crop_height=crop[0], crop_width=crop[1],
               jitter=False, seed=seed)
    image, label = Augmented([blocks(h, w, 6, seed)], c)[seed]
    assert image.shape == (3, *crop) and label.shape == crop and image.dtype == label.dtype == torch.uint8
    found, filled = decoded(image)
    padded = nn.functional.pad(label.float()[None, None], (1, 1, 1, 1), mode='replicate')[0, 0]
    shifted = [padded[y:y + crop[0], x:x + crop[1]] for y in range(3) for x in range(3)]
    around = torch.stack(shifted)                                  # (9,h,w)
    known = found >= 0
    assert (around == found).any(0)[known].all()
    if short*low >= min(h, w): assert (known | filled).float().mean() > .3


@moderate
@given(h=st.integers(8, 40), w=st.integers(8, 40), crop=st.tuples(sizes, sizes), seed=st.integers(0, 10_000))
def test_label_is_exact_without_scaling(h, w, crop, seed):
    "At scale 1 every pixel of the crop carries its own label, filled ones 255."
    c = config(short=min(h, w), scale_low=1., scale_high=1., crop_height=crop[0], crop_width=crop[1], jitter=False)
    image, label = Augmented([blocks(h, w, 3, seed)], c)[seed]
    found, filled = decoded(image)
    assert ((found != -1) ^ filled).all() and torch.equal(torch.where(filled, 255, found), label.long())


def test_items_depend_on_their_number_alone():
    "Whatever was drawn before; every image once an epoch; other seeds, other items; the generator outside is left alone."
    data, c = LabelledScenes('train', 5, 32), config(short=32, crop_height=32, crop_width=32, seed=1)
    a, b = Augmented(data, c), Augmented(data, c)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    later = [b[p] for p in (7, 3)]
    assert all(torch.equal(x, y) for p, item in zip((7, 3), later) for x, y in zip(a[p], item))
    assert torch.equal(torch.rand(1), expected)
    plain = replace(c, scale_low=1., scale_high=1., jitter=False, seed=2)
    drawn = [Augmented(data, plain)[p][0] for p in range(10)]
    same = lambda x, y: torch.equal(x, y) or torch.equal(x.flip(2), y)
    for epoch in (drawn[:5], drawn[5:]):
        assert sorted(next(i for i in range(5) if same(x, data[i][0])) for x in epoch) == list(range(5))
    other = Augmented(data, replace(plain, seed=3))
    assert not torch.equal(torch.stack(drawn[:5]), torch.stack([other[p][0] for p in range(5)]))


# Loss and score

def test_ignored_pixels_change_nothing():
    "Neither loss nor gradient nor score sees what lies under 255."
    torch.manual_seed(0)
    model, image = network().eval(), torch.rand(2, 3, 16, 20)
    label = torch.randint(0, 12, (2, 16, 20))
    label[:, :, 8:] = 255
    scores = model(image)
    changed = scores.detach().clone()
    changed[..., 8:] = torch.randn_like(changed[..., 8:])
    scores.retain_grad()
    loss = segmentation_loss(scores, label)
    loss.backward()
    assert loss.item() == pytest.approx(segmentation_loss(changed, label).item())
    assert (scores.grad[..., 8:] == 0).all() and (scores.grad[..., :8] != 0).any()
    logs = scores.log_softmax(1)
    by_hand = [-logs[n, label[n, y, x], y, x].item() for n in range(2) for y in range(16) for x in range(8)]
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)


class Constant(nn.Module):
    "Always gives class 1."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x): return torch.stack([torch.full_like(x[:, 0], v) for v in (0., 1., 0.)], 1)


def test_evaluation_by_hand():
    "Two images of different, odd sizes: class 1 has 3 + 2 pixels right of 6 + 4 labelled; class 2 does not occur."
    first, second = torch.tensor([[1, 1, 1], [0, 0, 0], [255, 255, 255]]), torch.tensor([[1, 1, 0, 0, 255]])
    data = [(torch.zeros(3, *y.shape, dtype=torch.uint8), y) for y in (first, second)]
    c = config(short=8, test=0)
    result = evaluate(Constant(), data, c, 3, keep=1)
    assert result['iou'][:2] == [0, 50] and np.isnan(result['iou'][2])
    assert result['miou'] == 25 and result['accuracy'] == 50
    assert len(result['prediction']) == 1 and (result['prediction'][0] == 1).all()
    assert result['prediction'][0].shape == (3, 3)
    assert evaluate(Constant(), data, replace(c, test=1), 3)['miou'] == 25
    with pytest.raises(ValueError, match='labels go up to 1, but there are 1 classes'):
        evaluate(Constant(), data, c, 1)
    with pytest.raises(ValueError, match='all are 255'):
        evaluate(Constant(), [(data[0][0], first*0 + 255)], c, 3)


@moderate
@given(h=st.integers(3, 50), w=st.integers(3, 50), short=st.integers(8, 60), window=st.booleans())
def test_prediction_has_the_images_size(h, w, short, window):
    "Any size, whole or in windows; a network that looks at single pixels gives the same either way."
    torch.manual_seed(0)
    pixels, image = nn.Conv2d(3, 5, 1), torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    c = config(short=short, crop_height=16, crop_width=24, window=window)
    prediction = predict(pixels, image, c)
    assert prediction.shape == (h, w) and prediction.dtype == torch.uint8
    assert (prediction == predict(pixels, image, replace(c, window=not window))).float().mean() > .99


# Network and weights

@pytest.mark.parametrize('name,stride,output_stride,shape', [
    ('resnet50', 0, 8, (2048, 8, 10)), ('resnet50', 0, 16, (2048, 4, 5)), ('resnet50', 16, 8, (1024, 8, 10)),
    ('resnet50', 0, 32, (2048, 2, 3)), ('shufflenet_v2_x1_0', 8, 8, (116, 8, 10)),
    ('resnext50_32x4d', 0, 8, (2048, 8, 10))])
def test_dilation_keeps_the_weights(name, stride, output_stride, shape):
    "The map wanted, and the names and shapes that pre-training saved."
    fine, plain = segmentation_backbone(name, stride, output_stride), make_backbone(name, stride or None)
    assert feature_shape(fine, (64, 80)) == shape
    assert {n: t.shape for n, t in fine.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}


def test_dilated_map_agrees_with_the_strided_one():
    "torchvision's first dilated block sees what the strided one saw: every second cell of layer3's first block is the strided map's."
    torch.manual_seed(0)
    fine, plain = segmentation_backbone('resnet50', 0, 8).eval(), make_backbone('resnet50').eval()
    plain.load_state_dict(fine.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for n in ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2'): x = getattr(fine, n)(x)
        torch.testing.assert_close(fine.layer3[0](x)[..., ::2, ::2], plain.layer3[0](x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', ['resnet18', 'convnext_tiny'])
def test_what_cannot_dilate_says_so(name):
    "It is used as it is, with a warning."
    with pytest.warns(UserWarning, match="can't replace stride by dilation.*32 pixels"):
        net = segmentation_backbone(name)
    assert feature_shape(net, 64)[1:] == (2, 2)


def test_timm_dilates():
    "timm's switch."
    fine, plain = segmentation_backbone('resnet26', 0, 8), make_backbone('resnet26')
    assert feature_shape(fine, 64)[1:] == (8, 8) and list(fine.state_dict()) == list(plain.state_dict())


def run_folder(path, parameters, state):
    "A run folder as train.ipynb leaves it: a checkpoint with both encoders."
    path.mkdir()
    both = {f'online.backbone.{n}': t for n, t in state.items()}
    both |= {f'target.backbone.{n}': t*0 for n, t in state.items()}
    both['online.dense_head.0.weight'] = torch.zeros(1)
    torch.save(dict(format=FORMAT, config=parameters, step=3, model=both), path/'checkpoint.pt')
    return path


SMALL_NET = dict(backbone='shufflenet_v2_x0_5', stride=8)
OF_A_RUN = SMALL_NET | dict(dense_weight=.5, matching='sim', reweight=False)


def test_weights_arrive(tmp_path):
    "Online or target encoder; a key too few, too many or of another shape is named."
    net = make_backbone('shufflenet_v2_x0_5', 8)
    state, first = net.state_dict(), 'conv1.0.weight'
    for encoder, factor in (('online', 1), ('target', 0)):
        loaded, about = load_backbone(run_folder(tmp_path/encoder, SMALL_NET, state), encoder=encoder)
        assert about == SMALL_NET
        assert all(torch.equal(t, state[n]*factor) for n, t in loaded.state_dict().items())
    without, other = {n: t for n, t in state.items() if n != first}, state | {first: torch.zeros(2)}
    fits_not = f"don't fit 'shufflenet_v2_x0_5' at stride 8, the first is '{first}'"
    for k, wrong in enumerate((without, other)):
        with pytest.raises(ValueError, match=fits_not):
            load_backbone(run_folder(tmp_path/f'w{k}', SMALL_NET, wrong))
    more = run_folder(tmp_path/'more', SMALL_NET, state | {'fc.weight': torch.zeros(2)})
    with pytest.raises(ValueError, match="1 weights of .* first is 'fc.weight'"): load_backbone(more)
    with pytest.raises(FileNotFoundError, match='is no run folder'): load_backbone(tmp_path)


# Training

@contextmanager
def stopped_at(step, monkeypatch):
    "A run inside is interrupted before a step."
    def train(*args):
        if args[5] == step: raise KeyboardInterrupt
        return train_step(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(room, 'train_step', train)
        yield


AMPS = ['off', 'bf16']


@pytest.mark.parametrize('amp', AMPS)
def test_resume_is_exact(tmp_path, monkeypatch, amp):
    "Four steps at once, or two of four, a stop, and the rest: the same weights and log."
    data = LabelledScenes('train', 4, 32)
    c = config(**tiny, seed=3, amp=amp, log_steps=1, save_minutes=0, out=tmp_path/'whole')
    whole = network()
    log = fine_tune(whole, data, c)
    c = replace(c, out=str(tmp_path/'cut'))
    with stopped_at(2, monkeypatch): fine_tune(network(), data, c)
    assert torch.load(tmp_path/'cut'/'checkpoint.pt')['step'] == 2
    rest = network(seed=9)
    again = fine_tune(rest, data, c)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values()))
    assert [line['loss'] for line in again] == [line['loss'] for line in log]
    with pytest.raises(ValueError, match='seed 3, now 4'): fine_tune(rest, data, replace(c, seed=4))


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_precision_may_change(tmp_path, monkeypatch, optimizer):
    "Float32, then bf16, then float32 again over two resumes: the bits of a loop that changes without a stop."
    data = LabelledScenes('train', 4, 32)
    c = config(**tiny | dict(iterations=6), optimizer=optimizer, log_steps=1, save_minutes=0, out=tmp_path)
    amps = ['off', 'off', 'bf16', 'bf16', 'off', 'off']
    whole = share_dropout(network())
    made = make_optimizer(optimizer, parameter_groups(whole, c), c.lr, c.weight_decay)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    for k, (image, label, _) in enumerate(batches(data, c)):
        train_step(whole, made, scaler, image, label, k, replace(c, amp=amps[k]))
    for stop in (2, 4):
        with stopped_at(stop, monkeypatch): fine_tune(network(), data, replace(c, amp=amps[stop - 1]))
    last = network(seed=9)
    fine_tune(last, data, c)
    for n, t in whole.state_dict().items(): assert torch.equal(t, last.state_dict()[n]), n


def test_everything_learns_and_the_head_faster(tmp_path):
    "With plain SGD on one image the first step moves the head `head_lr` times as far."
    data, moved = [LabelledScenes('train', 4, 32)[0]]*4, {}
    for head_lr in (1., 3.):
        model = network()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        c = config(**tiny | dict(iterations=1), optimizer='sgd', weight_decay=0., head_lr=head_lr,
                   out=tmp_path/f'{head_lr}')
        fine_tune(model, data, c)
        moved[head_lr] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        assert all(m.any() for m in moved[head_lr].values())
    for n, m in moved[1.].items():
        times = 3. if n.startswith('head') else 1.
        torch.testing.assert_close(moved[3.][n], m*times, rtol=1e-2, atol=1e-6)


def test_class_count_mismatch(tmp_path):
    "A label beyond the head's classes stops the training with both numbers."
    data = LabelledScenes('train', 4, 32)
    with pytest.raises(ValueError, match='the head has 3 classes'):
        fine_tune(network(3), data, config(**tiny, out=tmp_path))


def test_batch_without_labels_is_harmless(tmp_path):
    "All 255: loss 0, finite weights."
    data = [(x, torch.full_like(y, 255)) for x, y in map(LabelledScenes('train', 4, 32).__getitem__, range(4))]
    model = network()
    log = fine_tune(model, data, config(**tiny, log_steps=1, out=tmp_path))
    assert len(log) == 4 and all(line['loss'] == 0 for line in log)
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_learns_on_grey_images_of_odd_sizes(tmp_path):
    "Two files of one channel, dark left and bright right, are told apart after some steps."
    for k, (h, w) in enumerate(((33, 47), (51, 38))):
        label = np.zeros((h, w), np.uint8)
        label[:, w//2:] = 1
        label[0] = 255
        for folder in ('images', 'labels'): (tmp_path/folder/'train').mkdir(parents=True, exist_ok=True)
        grey = np.where(label == 1, 200, 50).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path/'images'/'train'/f'{k}.png')
        Image.fromarray(label).save(tmp_path/'labels'/'train'/f'{k}.png')
    data = open_labelled(str(tmp_path))
    c = config(**tiny | dict(iterations=40, lr=1e-2, labelled=0, test=0), out=tmp_path/'run')
    model = network(data.classes)
    fine_tune(model, data, c)
    assert evaluate(model, data, c, data.classes)['miou'] > 85
    with pytest.raises(ValueError, match='labelled must be at most the number of training images, 2, got 3'):
        configure_segment(data=tmp_path, labelled=3, out=tmp_path/'run')


def test_steps_that_explode_are_left_out(tmp_path):
    "Ten in a row stop the run; the images of each are named."
    data = LabelledScenes('train', 4, 32)
    c = config(**tiny | dict(iterations=20), optimizer='sgd', lr=1e30, log_steps=1, out=tmp_path)
    with pytest.raises(FloatingPointError, match='10 steps in a row'): fine_tune(network(), data, c)
    skipped = read_lines(tmp_path/'skipped.jsonl')
    assert len(skipped) == 10 and all(set(line['images']) <= set('0123') for line in skipped)


def test_poly():
    "Ends, power and lowest rate."
    assert poly(0, 10, .1) == pytest.approx(.1) and poly(10, 10, .1) == pytest.approx(1e-4)
    assert poly(5, 10, .1, 0, 1) == pytest.approx(.05)
    assert all(poly(k, 10, .1) > poly(k+1, 10, .1) for k in range(10))


def test_paint():
    "Black for no class, the same colour after twenty."
    picture = paint(torch.tensor([[255, 0, 20, 1]]))
    assert picture.shape == (3, 1, 4) and (picture[:, 0, 0] == 0).all()
    assert torch.equal(picture[:, 0, 1], picture[:, 0, 2]) and not torch.equal(picture[:, 0, 1], picture[:, 0, 3])


# Never lost

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')}
ENVIRONMENT |= dict(OMP_NUM_THREADS='1')
RUN = tiny | dict(backbone='shufflenet_v2_x0_5', stride=4, iterations=12, batch=4, log_steps=1, save_minutes=0, amp='off')


def start(*words, **kwargs):
    "A child in a session of its own, with its output to read."
    return subprocess.Popen([sys.executable, *map(str, words)], env=ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True, **kwargs)


def program(processes=1, **given):
    "Command line of pixcon.segment in some processes."
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
    flags = [f'--{n}={v}' for n, v in {**RUN, **given}.items()]
    return [*(torchrun if processes > 1 else []), '-m', 'pixcon.segment', *flags]


def same(a, b):
    "Two run folders hold the same weights and lines of the log."
    states = [torch.load(Path(p)/'checkpoint.pt', weights_only=True) for p in (a, b)]
    assert states[0]['step'] == states[1]['step']
    for n, t in states[0]['model'].items(): assert torch.equal(t, states[1]['model'][n]), n
    timing = {'images_per_s', 'seconds'}
    logs = [[{n: v for n, v in line.items() if n not in timing} for line in read_log(p)] for p in (a, b)]
    assert logs[0] == logs[1]


def kill(child):
    "SIGKILL for a child and all that it started."
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


@pytest.mark.parametrize('processes', [1, 2])
def test_killed_at_random_moments(tmp_path, processes):
    "SIGKILL at any moment, also while a checkpoint is written; the same command again ends with the same bits."
    whole = start(*program(processes, out=tmp_path/'whole'))
    said = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, said
    rng, folder, kills = np.random.default_rng(processes), tmp_path/'killed', 0
    wanted = KILLS if processes == 1 else -(-KILLS//3)
    while kills < wanted:
        child, lines, until = start(*program(processes, out=folder)), len(read_log(folder)), time.time() + 200
        while child.poll() is None and len(read_log(folder)) <= lines and time.time() < until: time.sleep(.005)
        time.sleep(rng.uniform(0, .05))
        kills += child.poll() is None
        kill(child)
        if len(read_log(folder)) == RUN['iterations'] and kills < wanted: folder.rename(tmp_path/f'ended{kills}')
    last = start(*program(processes, out=folder))
    said = last.communicate(timeout=300)[0]
    assert last.returncode == 0, said
    for ended in (folder, *tmp_path.glob('ended*')):
        if (ended/'result.json').exists(): same(tmp_path/'whole', ended)
    results = [json.loads((tmp_path/f/'result.json').read_text()) for f in ('whole', 'killed')]
    assert results[0]['iou'] == results[1]['iou']


def prepared(out, **given):
    "Parameters, images and network of a run in this process."
    c, train, val = configure_segment(**RUN | given, out=out)
    return make_segmenter(c, val.classes), train, c


def test_damaged_checkpoint(tmp_path, monkeypatch):
    "Cut off, empty or noise: it is set aside with a warning, the one before is used, and the end is the same."
    fine_tune(*prepared(tmp_path/'whole'))
    spoilers = (lambda b: b[:len(b)//2], lambda b: b'', lambda b: bytes(reversed(b)))
    for k, spoil in enumerate(spoilers):
        folder = tmp_path/f'spoiled{k}'
        with stopped_at(7, monkeypatch): fine_tune(*prepared(folder))
        newest = folder/'checkpoint.pt'
        newest.write_bytes(spoil(newest.read_bytes()))
        with pytest.warns(UserWarning, match='set aside as checkpoint.damaged, and the one before is used'):
            fine_tune(*prepared(folder))
        assert (folder/'checkpoint.damaged').exists()
        same(tmp_path/'whole', folder)


def test_no_checkpoint_left(tmp_path, monkeypatch):
    "Both damaged, or one of the first edition: the run does not silently begin anew."
    with stopped_at(3, monkeypatch): fine_tune(*prepared(tmp_path/'run'))
    for path in (tmp_path/'run').glob('checkpoint*.pt'): path.write_bytes(b'')
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with pytest.raises(ValueError, match='no checkpoint in .* can be read'):
                fine_tune(*prepared(tmp_path/'run'))
    old = tmp_path/'old'
    old.mkdir()
    torch.save(dict(about={}, step=3, log=[], model={}), old/'checkpoint.pt')
    with pytest.raises(ValueError, match='first edition'): fine_tune(*prepared(old))


def test_full_disk(tmp_path, monkeypatch):
    "A file can't grow: a clear message, the old checkpoint intact, no half file left; with room again the run ends as it would have."
    larger = dict(backbone='shufflenet_v2_x1_0', stride=8)
    fine_tune(*prepared(tmp_path/'whole', **larger))
    folder = tmp_path/'full'
    with stopped_at(3, monkeypatch): fine_tune(*prepared(folder, **larger))
    old = (folder/'checkpoint.pt').read_bytes()
    assert len(old) > 300_000

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    full = start(*program(out=folder, **larger), preexec_fn=small)
    said = full.communicate(timeout=120)[0]
    assert full.returncode != 0 and 'could not be written' in said and 'Is the disk full?' in said, said
    assert 'Traceback' not in said and (folder/'checkpoint.pt').read_bytes() == old
    assert not list(folder.glob('*.part'))
    fine_tune(*prepared(folder, **larger))
    same(tmp_path/'whole', folder)


def test_another_start_is_another_run(tmp_path):
    "Other images, or a checkpoint that has been trained on since: the run folder is not mixed up with it."
    net = make_backbone('shufflenet_v2_x0_5', 8)
    pre = run_folder(tmp_path/'pre', OF_A_RUN, net.state_dict())
    given = {n: v for n, v in RUN.items() if n not in ('backbone', 'stride')} | dict(checkpoint=pre, out=tmp_path/'run')
    c, train, val = configure_segment(**given)
    fine_tune(make_segmenter(c, 12), train, c)
    fine_tune(make_segmenter(c, 12), train, replace(c, workers=1, test=1, window=True))
    with pytest.raises(ValueError, match="images '4 images .*, now '3 images"):
        fine_tune(make_segmenter(c, 12), val, c)
    (pre/'checkpoint.pt').unlink()
    pre.rmdir()
    torch.nn.init.zeros_(net.conv1[0].weight)
    run_folder(pre, OF_A_RUN, net.state_dict())
    with pytest.raises(ValueError, match="weights '3 steps .*, now '3 steps"):
        fine_tune(make_segmenter(c, 12), train, c)


# Several processes

PAIR = '''
import json, os, sys
from dataclasses import replace
import torch
import torch.nn as nn
from pixcon import distributed as d
from pixcon.labelled import LabelledScenes
from pixcon.run import read_log
from pixcon.segment import Segmenter, configure_segment, evaluate, fine_tune
torch.set_num_threads(1)
if 'WORLD_SIZE' in os.environ: d.join()
given, out, norm = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == 'norm'
c, train, _ = configure_segment(**given, out=f'{out}/run{d.world()}')
torch.manual_seed(0)
model = Segmenter(nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16) if norm else nn.ReLU()), 12)
if not norm: model.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Dropout(.3), nn.Conv2d(16, 12, 1))
fine_tune(model, train, c)
mixed = [LabelledScenes('val', 7, 24 + 9*i)[i] for i in range(7)]     # sizes and number do not divide
score = evaluate(model, mixed, c, 12, keep=3)
losses = [line['loss'] for line in read_log(c.out)] if d.rank() == 0 else []
torch.save(dict(loss=losses, model=model.state_dict(), score=score), f'{out}/{d.rank()}-of-{d.world()}.pt')
d.leave()
'''


def run_pair(tmp_path, norm, **given):
    "What one process and each of two ended with."
    (tmp_path/'pair.py').write_text(PAIR)
    wanted = {n: v for n, v in RUN.items() if n not in ('backbone', 'stride')}
    wanted |= dict(iterations=6, test=0, scale_low=.5, scale_high=1.) | given
    for n in (1, 2):
        torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}']
        child = start(*torchrun, tmp_path/'pair.py', json.dumps(wanted), tmp_path, norm)
        said = child.communicate(timeout=300)[0]
        assert child.returncode == 0, said
    return [torch.load(tmp_path/f'{name}.pt') for name in ('0-of-1', '0-of-2', '1-of-2')]


# Without batch statistics only the order of sums differs between one process and two. In float32 that is
# some 1e-7 of a loss at first, and six steps carry it on. In bf16 each part's gradient is rounded to 8 bits,
# up to 0.4 %, before the parts are added, and a step of AdamW can turn that into a change of its own size.
@pytest.mark.parametrize('amp,bound', [('off', 1e-5), ('bf16', 2e-2)])
def test_two_processes_are_one(tmp_path, amp, bound):
    "The same weights on both, bit for bit; losses of 2 x B/2 are those of 1 x B, dropout and unlabelled pixels included."
    one, first, second = run_pair(tmp_path, 'plain', amp=amp)
    for n, t in first['model'].items(): assert torch.equal(t, second['model'][n]), n
    assert len(one['loss']) == len(first['loss']) == 6
    np.testing.assert_allclose(first['loss'], one['loss'], rtol=bound)
    if amp == 'off':
        for n, t in one['model'].items(): torch.testing.assert_close(first['model'][n], t, atol=1e-4, rtol=1e-3)


def test_two_processes_share_batch_statistics(tmp_path):
    "Both end with the same weights and statistics, and their losses are those of one process."
    one, first, second = run_pair(tmp_path, 'norm', amp='off')
    np.testing.assert_allclose(first['loss'], one['loss'], rtol=1e-3)
    for n, t in first['model'].items(): assert torch.equal(t, second['model'][n]), n
    assert first['score']['iou'] == pytest.approx(second['score']['iou'], abs=0, nan_ok=True)


def test_evaluation_is_shared_exactly(tmp_path):
    "Seven images over two processes: confusion matrix and predictions of one, with the network that two trained."
    _, first, second = run_pair(tmp_path, 'plain', iterations=3)
    torch.manual_seed(0)
    model = Segmenter(nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU()), 12)
    parts = nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Dropout(.3), nn.Conv2d(16, 12, 1)
    model.head = nn.Sequential(*parts)
    model.load_state_dict(first['model'])
    mixed = [LabelledScenes('val', 7, 24 + 9*i)[i] for i in range(7)]
    alone = evaluate(model, mixed, config(**tiny | dict(test=0)), 12, keep=3)
    for of_two in (first['score'], second['score']):
        assert str(of_two['iou']) == str(alone['iou']) and of_two['accuracy'] == alone['accuracy']
        assert all(torch.equal(a, b) for a, b in zip(of_two['prediction'], alone['prediction'], strict=True))


def test_shared_dropout_divides_the_batch(monkeypatch):
    "Two processes' halves together are what one drops of the whole."
    x = torch.ones(6, 5, 4)
    torch.manual_seed(1)
    whole = SharedDropout(.4)(x)
    monkeypatch.setattr(room, 'world', lambda: 2)
    halves = []
    for r in (0, 1):
        monkeypatch.setattr(room, 'rank', lambda: r)
        torch.manual_seed(1)
        halves.append(SharedDropout(.4)(x[:3]))
    assert torch.equal(torch.cat(halves), whole) and {0.} < set(whole.unique().tolist())


def test_batch_is_cut_into_equal_parts(tmp_path):
    "A batch that the processes can't share equally is refused, with one line."
    child = start(*program(2, batch=3, out=tmp_path/'run'))
    said = child.communicate(timeout=120)[0]
    assert child.returncode != 0 and 'pixcon.segment: batch must be a multiple of the number of processes, 2, got 3' in said


# Parameters

@pytest.mark.parametrize('name', SEGMENT_RECIPES)
def test_recipes_are_complete(name):
    "Every value of a recipe is one that may be given, and the recipe is what it says."
    values = SEGMENT_RECIPES[name]
    assert check(SegmentConfig, values) == values
    found = asdict(segment_config('voc', recipe=name))
    assert {n: found[n] for n in values} == values and found['recipe'] == name
    assert asdict(segment_config('voc', recipe=name, **values)) == found


@pytest.fixture(scope='module')
def notebook(): return json.loads((ROOT/'nbs'/'finetune_segment.ipynb').read_text())


def test_notebook_offers_every_parameter(notebook):
    "The parameters cell has the names, types and comments of SegmentConfig, and how many processes to start."
    tagged, = (c for c in notebook['cells'] if 'parameters' in c['metadata'].get('tags', []))
    lines = [re.match(r'(\w+):(\w+) = (.+?) +# (.+)', line).groups() for line in ''.join(tagged['source']).splitlines()]
    offered = {n: (kind, why) for n, kind, _, why in lines}
    assert len(lines) == len(offered)
    processes = offered.pop('processes')
    assert processes[0] == 'int'
    assert offered == {f.name: (f.type.__name__, f.metadata['why']) for f in fields(SegmentConfig)}
    defaults = {f.name: f.default for f in fields(SegmentConfig)} | dict(processes=1)
    for n, _, value, _ in lines: assert eval(value) in (None, defaults[n]), n


def test_notebook_reads_as_a_report(notebook):
    "No cell of more than twelve lines besides the parameters."
    for c in notebook['cells']:
        if c['cell_type'] == 'code' and 'parameters' not in c['metadata'].get('tags', []):
            assert len(''.join(c['source']).splitlines()) <= 12, ''.join(c['source'])


def papermill(folder, timeout=300, **parameters):
    "Runs the notebook in a folder; returns the finished process."
    flags = [a for n, v in parameters.items() for a in ('-p', n, str(v))]
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')}
    command = ['papermill', ROOT/'nbs'/'finetune_segment.ipynb', 'out.ipynb', '--no-progress-bar', *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize('processes', [1, 2])
def test_notebook_writes_results(tmp_path, processes):
    "With a checkpoint: both results, the files, the pictures; the same command again trains no more."
    run_folder(tmp_path/'pre', OF_A_RUN, make_backbone('shufflenet_v2_x0_5', 8).state_dict())
    first = papermill(tmp_path, checkpoint='pre', processes=processes, **tiny)
    assert first.returncode == 0, first.stderr[-3000:]
    run, = (tmp_path/'runs').iterdir()
    assert run.name == 'segment-scenes-pre-seed0'
    of_run = {'checkpoint.pt', 'config.json', 'log.jsonl', 'result.json'}
    assert {p.name for p in run.iterdir()} == of_run | {'random', 'items.png', 'loss.png', 'predictions.png'}
    assert {p.name for p in (run/'random').iterdir()} == of_run
    paths = run/'result.json', run/'random'/'result.json'
    ours, random = (json.loads(p.read_text(), parse_constant=pytest.fail) for p in paths)
    assert {'task', 'data', 'checkpoint', 'variant', 'seed', 'miou', 'iou', 'accuracy', 'seconds'} <= set(ours)
    assert (ours['task'], ours['variant'], ours['checkpoint']) == ('segment', 'sim', 'pre')
    assert (random['variant'], random['checkpoint']) == ('random', '')
    assert 0 <= ours['miou'] <= 100 and len(ours['iou']) == 12
    assert ours['settings']['backbone'] == 'shufflenet_v2_x0_5' and ours['settings']['iterations'] == 4
    if processes > 1: return
    saved = (run/'checkpoint.pt').stat().st_mtime_ns
    assert papermill(tmp_path, checkpoint='pre', **tiny).returncode == 0
    assert (run/'checkpoint.pt').stat().st_mtime_ns == saved
    assert json.loads((run/'result.json').read_text())['miou'] == ours['miou']


WRONG = [
    (dict(iteration=8), "unknown parameter 'iteration', did you mean 'iterations'?"),
    (dict(lr='high'), "lr must be a number, got 'high'"),
    (dict(data='/no/such/folder'), "'/no/such/folder' is no folder"),
    (dict(recipe='voc'), 'recipe must be one of'),
    (dict(batch=1), 'batch must be at least 2'),
    (dict(head='unet'), "head must be one of 'fcn', 'deeplabv3', got 'unet'"),
    (dict(amp='half'), 'amp must be one of'),
    (dict(checkpoint='pre', backbone='resnet18'), 'backbone is that of the checkpoint'),
    (dict(val_split='test'), "no split 'test'"),
    (dict(scale_low=9.), 'scale_low must be at most scale_high')]


@pytest.mark.parametrize('wrong,message', WRONG)
def test_wrong_parameters_are_named(tmp_path, monkeypatch, wrong, message):
    "With what is allowed."
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path/'pre', OF_A_RUN, make_backbone('shufflenet_v2_x0_5', 8).state_dict())
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as e: configure_segment(**wrong)
    assert message in str(e.value)


@pytest.mark.parametrize('wrong,message', [
    (dict(iteration=8), "unknown parameter 'iteration'"), (dict(checkpoint='nowhere'), "'nowhere' is no run folder"),
    (dict(processes=0), 'processes must be a whole number of at least 1, got 0')])
def test_wrong_parameter_stops(tmp_path, wrong, message):
    "Before any work, with a message that names it."
    stopped = papermill(tmp_path, timeout=120, **wrong)
    assert stopped.returncode != 0 and message in stopped.stderr
    assert not (tmp_path/'runs').exists()


def test_command_line_says_what_is_wrong_in_one_line():
    "No traceback."
    child = start('-m', 'pixcon.segment', '--batch=1')
    said = child.communicate(timeout=120)[0]
    assert child.returncode != 0 and said.strip() == 'pixcon.segment: batch must be at least 2, got 1'
