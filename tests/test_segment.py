"""Fine-tuning: image and label stay together, what is ignored changes nothing, runs resume exactly, the notebook as a user runs it."""
import json
import os
import subprocess
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pixcon.augment import imagenet_mean
from pixcon.encoder import feature_shape, make_backbone
from pixcon.labelled import LabelledScenes, open_labelled
from pixcon.segment import (SEGMENT_RECIPES, Augmented, Segmenter, _options, configure_segment, evaluate, fine_tune, load_backbone, paint, poly, predict, segmentation_backbone,
                            segmentation_loss, resolve_recipe)

ROOT = Path(__file__).parent.parent
moderate = settings(max_examples=40, deadline=None, derandomize=True)
tiny = dict(batch=2, iterations=4, labelled=4, test=3, crop_height=32, crop_width=40, short=32)


def recipe(**given): return resolve_recipe('scenes', **given)[1]


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
    for c, colour in CODES.items(): image[:, label == c] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    return image, label


def decoded(image):
    "Class that the colours encode, -1 for a mixture, and where the image was filled."
    distance = torch.stack([(image.int() - torch.tensor(c)[:, None, None]).abs().amax(0) for c in CODES.values()])  # (5,h,w)
    nearest = distance.min(0)
    label = torch.where(nearest.values <= 6, torch.tensor(list(CODES))[nearest.indices], -1)
    return label, (image.int() == torch.tensor(FILL)[:, None, None]).all(0)


@moderate
@given(h=st.integers(9, 70), w=st.integers(9, 70), crop=st.tuples(st.integers(8, 60), st.integers(8, 60)), short=st.integers(8, 80),
       low=st.floats(.4, 1), more=st.floats(1, 2.5), seed=st.integers(0, 10_000))
def test_label_stays_with_its_image(h, w, crop, short, low, more, seed):
    "Any size, scale, crop and flip: wherever the colour is a class's code, that class is the label of this pixel or of a neighbour's."
    r = recipe(short=short, scale_low=low, scale_high=low*more, crop_height=crop[0], crop_width=crop[1], jitter=False)
    image, label = Augmented([blocks(h, w, 6, seed)], r, seed)[seed]
    assert image.shape == (3, *crop) and label.shape == crop and image.dtype == label.dtype == torch.uint8
    (found, filled), padded = decoded(image), torch.nn.functional.pad(label.int()[None, None].float(), (1, 1, 1, 1), mode='replicate')[0, 0]
    around = torch.stack([padded[y:y + crop[0], x:x + crop[1]] for y in range(3) for x in range(3)])  # (9,h,w)
    known = found >= 0
    assert (around == found).any(0)[known].all()
    if short*low >= min(h, w): assert (known | filled).float().mean() > .3


@moderate
@given(h=st.integers(8, 40), w=st.integers(8, 40), crop=st.tuples(st.integers(8, 60), st.integers(8, 60)), seed=st.integers(0, 10_000))
def test_label_is_exact_without_scaling(h, w, crop, seed):
    "At scale 1 every pixel of the crop carries its own label, filled ones 255."
    r = recipe(short=min(h, w), scale_low=1., scale_high=1., crop_height=crop[0], crop_width=crop[1], jitter=False)
    image, label = Augmented([blocks(h, w, 3, seed)], r)[seed]
    found, filled = decoded(image)
    assert ((found != -1) ^ filled).all() and torch.equal(torch.where(filled, 255, found), label.long())


def test_items_depend_on_their_number_alone():
    "Whatever was drawn before; every image once an epoch; other seeds, other items; the generator outside is left alone."
    data, r = LabelledScenes('train', 5, 32), recipe(short=32, crop_height=32, crop_width=32)
    a, b = Augmented(data, r, 1), Augmented(data, r, 1)
    later = [b[p] for p in (7, 3)]
    torch.manual_seed(0); expected = torch.rand(1); torch.manual_seed(0)
    assert all(torch.equal(x, y) for p, item in zip((7, 3), later) for x, y in zip(a[p], item))
    assert torch.equal(torch.rand(1), expected)
    plain = recipe(short=32, crop_height=32, crop_width=32, scale_low=1., scale_high=1., jitter=False)
    drawn = [Augmented(data, plain, 2)[p][0] for p in range(10)]
    same = lambda x, y: torch.equal(x, y) or torch.equal(x.flip(2), y)
    for epoch in (drawn[:5], drawn[5:]): assert sorted(next(i for i in range(5) if same(x, data[i][0])) for x in epoch) == list(range(5))
    assert not torch.equal(torch.stack(drawn[:5]), torch.stack([Augmented(data, plain, 3)[p][0] for p in range(5)]))


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
    assert loss.item() == pytest.approx(segmentation_loss(changed, label).item()) and (scores.grad[..., 8:] == 0).all() and (scores.grad[..., :8] != 0).any()
    by_hand = [-scores[n, :, y, x].log_softmax(0)[label[n, y, x]].item() for n in range(2) for y in range(16) for x in range(8)]
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)


class Constant(nn.Module):
    "Always gives class 1."
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.zeros(1))
    def forward(self, x): return torch.stack([torch.full_like(x[:, 0], v) for v in (0., 1., 0.)], 1)


def test_evaluation_by_hand():
    "Two images of different, odd sizes: class 1 has 3 + 2 pixels right of 6 + 4 labelled; class 2 does not occur."
    first, second = torch.tensor([[1, 1, 1], [0, 0, 0], [255, 255, 255]]), torch.tensor([[1, 1, 0, 0, 255]])
    data = [(torch.zeros(3, *y.shape, dtype=torch.uint8), y) for y in (first, second)]
    r = recipe(short=8, test=0)
    result = evaluate(Constant(), data, r, 3, keep=1)
    assert result['iou'][:2] == [0, 50] and np.isnan(result['iou'][2]) and result['miou'] == 25 and result['accuracy'] == 50
    assert len(result['prediction']) == 1 and (result['prediction'][0] == 1).all() and result['prediction'][0].shape == (3, 3)
    assert evaluate(Constant(), data, r | dict(test=1), 3)['miou'] == 25
    with pytest.raises(ValueError, match='labels go up to 1, but there are 1 classes'): evaluate(Constant(), data, r, 1)
    with pytest.raises(ValueError, match='all are 255'): evaluate(Constant(), [(data[0][0], first*0 + 255)], r, 3)


@moderate
@given(h=st.integers(3, 50), w=st.integers(3, 50), short=st.integers(8, 60), window=st.booleans())
def test_prediction_has_the_images_size(h, w, short, window):
    "Any size, whole or in windows; a network that looks at single pixels gives the same either way."
    torch.manual_seed(0)
    pixels, image = nn.Conv2d(3, 5, 1), torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    r = recipe(short=short, crop_height=16, crop_width=24, window=window)
    prediction = predict(pixels, image, r)
    assert prediction.shape == (h, w) and prediction.dtype == torch.uint8
    assert (prediction == predict(pixels, image, r | dict(window=not window))).float().mean() > .99


# Network and weights

@pytest.mark.parametrize('name,stride,output_stride,shape', [
    ('resnet50', 0, 8, (2048, 8, 10)), ('resnet50', 0, 16, (2048, 4, 5)), ('resnet50', 16, 8, (1024, 8, 10)), ('resnet50', 0, 32, (2048, 2, 3)),
    ('shufflenet_v2_x1_0', 8, 8, (116, 8, 10)), ('resnext50_32x4d', 0, 8, (2048, 8, 10))])
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
    with pytest.warns(UserWarning, match="can't replace stride by dilation.*32 pixels"): net = segmentation_backbone(name)
    assert feature_shape(net, 64)[1:] == (2, 2)


def test_timm_dilates():
    "timm's switch, where timm is installed."
    pytest.importorskip('timm')
    fine, plain = segmentation_backbone('resnet26', 0, 8), make_backbone('resnet26')
    assert feature_shape(fine, 64)[1:] == (8, 8) and list(fine.state_dict()) == list(plain.state_dict())


def run_folder(path, config, state):
    "A run folder as train.ipynb leaves it: a checkpoint with both encoders."
    path.mkdir()
    both = {f'online.backbone.{n}': t for n, t in state.items()} | {f'target.backbone.{n}': t*0 for n, t in state.items()} | {'online.dense_head.0.weight': torch.zeros(1)}
    torch.save(dict(config=config, step=3, model=both), path/'checkpoint.pt')
    return path


def test_weights_arrive(tmp_path):
    "Online or target; a key too few, too many or of another shape is named."
    net, config = make_backbone('shufflenet_v2_x0_5', 8), dict(backbone='shufflenet_v2_x0_5', stride=8)
    state, first = net.state_dict(), 'conv1.0.weight'
    for encoder, factor in (('online', 1), ('target', 0)):
        loaded, about = load_backbone(run_folder(tmp_path/encoder, config, state), encoder=encoder)
        assert about == config and all(torch.equal(t, state[n]*factor) for n, t in loaded.state_dict().items())
    for k, wrong in enumerate(({n: t for n, t in state.items() if n != first}, state | {first: torch.zeros(2)})):
        with pytest.raises(ValueError, match=f"don't fit 'shufflenet_v2_x0_5' at stride 8, the first is '{first}'"): load_backbone(run_folder(tmp_path/f'w{k}', config, wrong))
    with pytest.raises(ValueError, match="1 weights of .* first is 'fc.weight'"): load_backbone(run_folder(tmp_path/'more', config, state | {'fc.weight': torch.zeros(2)}))
    with pytest.raises(FileNotFoundError, match='is no run folder'): load_backbone(tmp_path)


# Training

def test_resume_is_exact(tmp_path):
    "Four steps at once, or two of four, a stop, and the rest: the same weights and log."
    data, r = LabelledScenes('train', 4, 32), recipe(**tiny)
    whole = network()
    log = fine_tune(whole, data, r, seed=3)
    class Stops(LabelledScenes):
        def __getitem__(self, i):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return super().__getitem__(i)
    stops, part = Stops('train', 4, 32), network()
    stops.left = 2*tiny['batch']
    with pytest.raises(KeyboardInterrupt): fine_tune(part, stops, r, 3, tmp_path/'c.pt', save_minutes=-1., log_steps=1)
    assert torch.load(tmp_path/'c.pt')['step'] == 2
    rest = network(seed=9)
    again = fine_tune(rest, data, r, 3, tmp_path/'c.pt')
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values()))
    assert again[-1]['loss'] == log[-1]['loss']
    with pytest.raises(ValueError, match='seed 3, now 4'): fine_tune(rest, data, r, 4, tmp_path/'c.pt')


def test_everything_learns_and_the_head_faster():
    "With plain SGD on one image the first step moves the head `head_lr` times as far."
    data, moved = [LabelledScenes('train', 4, 32)[0]]*4, {}
    for head_lr in (1., 3.):
        model = network()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        fine_tune(model, data, recipe(**tiny | dict(iterations=1), optimizer='sgd', weight_decay=0., head_lr=head_lr))
        moved[head_lr] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        assert all(m.any() for m in moved[head_lr].values())
    for n, m in moved[1.].items(): torch.testing.assert_close(moved[3.][n], m*(3. if n.startswith('head') else 1.), rtol=1e-2, atol=1e-6)


def test_class_count_mismatch():
    "A label beyond the head's classes stops the training with both numbers."
    data = LabelledScenes('train', 4, 32)
    with pytest.raises(ValueError, match='the head has 3 classes'): fine_tune(network(3), data, recipe(**tiny))


def test_batch_without_labels_is_harmless():
    "All 255: loss 0, finite weights."
    data = [(x, torch.full_like(y, 255)) for x, y in (LabelledScenes('train', 4, 32)[i] for i in range(4))]
    model = network()
    assert all(line['loss'] == 0 for line in fine_tune(model, data, recipe(**tiny)))
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_learns_on_grey_images_of_odd_sizes(tmp_path):
    "Two files of one channel, dark left and bright right, are told apart after some steps."
    for k, (h, w) in enumerate(((33, 47), (51, 38))):
        label = np.zeros((h, w), np.uint8); label[:, w//2:] = 1; label[0] = 255
        for folder in ('images', 'labels'): (tmp_path/folder/'train').mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(label == 1, 200, 50).astype(np.uint8)).save(tmp_path/'images'/'train'/f'{k}.png')
        Image.fromarray(label).save(tmp_path/'labels'/'train'/f'{k}.png')
    data, r = open_labelled(str(tmp_path)), recipe(**tiny | dict(iterations=40, lr=1e-2, labelled=0, test=0))
    model = network(data.classes)
    fine_tune(model, data, r)
    assert evaluate(model, data, r, data.classes)['miou'] > 85


def test_poly():
    "Ends, power and floor."
    assert poly(0, 10, .1) == pytest.approx(.1) and poly(10, 10, .1) == pytest.approx(1e-4) and poly(5, 10, .1, 0, 1) == pytest.approx(.05)
    assert all(poly(k, 10, .1) > poly(k+1, 10, .1) for k in range(10))


def test_paint():
    "Black for no class, the same colour after twenty."
    picture = paint(torch.tensor([[255, 0, 20, 1]]))
    assert picture.shape == (3, 1, 4) and (picture[:, 0, 0] == 0).all() and torch.equal(picture[:, 0, 1], picture[:, 0, 2]) and not torch.equal(picture[:, 0, 1], picture[:, 0, 3])


# Parameters

@pytest.mark.parametrize('name', SEGMENT_RECIPES)
def test_recipes_are_complete(name):
    "The same keys and types everywhere, and what `resolve_recipe` itself accepts."
    assert {k: type(v) for k, v in SEGMENT_RECIPES[name].items()} == {k: type(v) for k, v in SEGMENT_RECIPES['voc12aug'].items()}
    assert resolve_recipe('voc', name, **SEGMENT_RECIPES[name])[1] == SEGMENT_RECIPES[name]


def test_notebook_offers_every_parameter():
    "The parameters cell names what can be given, no more and no less."
    notebook = json.loads((ROOT/'nbs'/'finetune_segment.ipynb').read_text())
    tagged, = (c for c in notebook['cells'] if 'parameters' in c['metadata'].get('tags', []))
    names = [line.split(':')[0] for line in ''.join(tagged['source']).splitlines()]
    assert len(names) == len(set(names)) and set(names) == {*SEGMENT_RECIPES['small'], *_options, 'compare'}


def papermill(folder, timeout=300, **parameters):
    "Runs the notebook in a folder; returns the finished process."
    flags = [a for n, v in parameters.items() for a in ('-p', n, str(v))]
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')}
    return subprocess.run(['papermill', ROOT/'nbs'/'finetune_segment.ipynb', 'out.ipynb', '--no-progress-bar', *flags], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def test_notebook_writes_results(tmp_path):
    "With a checkpoint: both results, the files, the pictures; the same command again trains no more."
    run_folder(tmp_path/'pre', dict(backbone='shufflenet_v2_x0_5', stride=8, dense_weight=.5, matching='sim', reweight=False), make_backbone('shufflenet_v2_x0_5', 8).state_dict())
    first = papermill(tmp_path, checkpoint='pre', **tiny)
    assert first.returncode == 0, first.stderr[-3000:]
    run, = (tmp_path/'runs').iterdir()
    assert run.name == 'segment-scenes-pre-seed0'
    assert {p.name for p in run.iterdir()} == {'checkpoint.pt', 'checkpoint-random.pt', 'items.png', 'loss.png', 'predictions.png', 'result.json', 'result-random.json'}
    ours, random = (json.loads((run/f'result{n}.json').read_text(), parse_constant=pytest.fail) for n in ('', '-random'))
    assert {'task', 'data', 'checkpoint', 'variant', 'seed', 'miou', 'iou', 'accuracy', 'seconds'} <= set(ours)
    assert (ours['task'], ours['variant'], ours['checkpoint'], random['variant'], random['checkpoint']) == ('segment', 'sim', 'pre', 'random', '')
    assert 0 <= ours['miou'] <= 100 and len(ours['iou']) == 12 and ours['settings']['backbone'] == 'shufflenet_v2_x0_5' and ours['settings']['iterations'] == 4
    saved = (run/'checkpoint.pt').stat().st_mtime_ns
    assert papermill(tmp_path, checkpoint='pre', **tiny).returncode == 0
    assert (run/'checkpoint.pt').stat().st_mtime_ns == saved and json.loads((run/'result.json').read_text())['miou'] == ours['miou']


@pytest.mark.parametrize('wrong,message', [(dict(iteration=8), "unknown parameter 'iteration', did you mean 'iterations'?"), (dict(lr='high'), "lr must be a number, got 'high'"),
                                           (dict(data='/no/such/folder'), "'/no/such/folder' is no folder"), (dict(recipe='voc'), 'recipe must be one of'), (dict(batch=1), 'batch must be at least 2'),
                                           (dict(head='unet'), "head must be one of 'fcn', 'deeplabv3', got 'unet'"), (dict(amp='half'), 'amp must be one of'),
                                           (dict(checkpoint='x', backbone='resnet18'), 'backbone is that of the checkpoint'), (dict(val_split='test'), "no split 'test'")])
def test_wrong_parameters_are_named(wrong, message):
    "With what is allowed."
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as e: configure_segment(**wrong)
    assert message in str(e.value)


@pytest.mark.parametrize('wrong,message', [(dict(iteration=8), "unknown parameter 'iteration'"), (dict(checkpoint='nowhere'), "'nowhere' is no run folder")])
def test_wrong_parameter_stops(tmp_path, wrong, message):
    "Before any work, with a message that names it."
    stopped = papermill(tmp_path, timeout=120, **wrong)
    assert stopped.returncode != 0 and message in stopped.stderr
    assert not (tmp_path/'runs').exists()
