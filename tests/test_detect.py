"""AP counted a second way, the detector's parts, a run cut off or shared, the notebook as users run it."""
import copy
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torch.nn as nn
from made_coco import coco_content, save_images, scenes, thing  # scenes is a fixture
from torchvision.ops import FrozenBatchNorm2d, box_iou, masks_to_boxes
from pixcon import detect
from pixcon.detect import (DETECT_RECIPES, DetectConfig, Draws, ItemSampler, Pyramid,
                           average_precision, build_detector, configure_detect, detect_rate,
                           evaluate, fine_tune, learn_and_score, load_detector, make_detector,
                           own_items, parameter_groups, precise_bn, predict, rate_falls,
                           sample_counts, stage_maps, to_device, train_and_score,
                           with_comparison)
from pixcon.distributed import SharedBatchNorm, launch
from pixcon.encoder import make_backbone
from pixcon.objects import (Objects, coco_index, encode_mask, open_objects, voc_classes)
from pixcon.run import make_optimizer, read_lines, read_log
from pixcon.scenes import scene_classes

ROOT = Path(__file__).parent.parent
TINY = dict(width=8, hidden=16, mask_layers=1, proposals=20, rois=8, short=64, shortest=64,
            batch=2, iterations=2, backbone='shufflenet_v2_x0_5', labelled=0, test=0,
            workers=0, log_steps=1, amp='off')
KILLS = int(os.environ.get('PIXCON_KILLS', 3))
PRECISIONS = ('off', 'bf16')
not_given = ('IN_TEST', 'PIXCON_DATA')
environment = {k: v for k, v in os.environ.items() if k not in not_given}
paths = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
environment |= dict(OMP_NUM_THREADS='1', PYTHONPATH=paths)


def tiny(out, **given):
    "Parameters of the smallest kind."
    return configure_detect(**{**TINY, 'out': out, **given})


def detector(config, classes=8, seed=0):
    torch.manual_seed(seed)
    return make_detector(make_backbone('shufflenet_v2_x0_5', 8), classes, config)


def same_weights(a, b):
    "Two modules hold the same bits."
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


# Average precision

def corners(box):
    x, y, w, h = box
    return torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64)


def slow_class_ap(objects, found, level):
    "AP of one class at one overlap, by the definition: (image, box), (image, box, score)."
    free, right = set(range(len(objects))), []
    for image, box, _ in sorted(found, key=lambda f: -f[2]):
        near = [(box_iou(corners(objects[i][1]), corners(box)).item(), i)
                for i in free if objects[i][0] == image]
        best = max(near, default=(0, None))
        right.append(best[0] >= level)
        if best[0] >= level: free.remove(best[1])
    precision = np.cumsum(right)/np.arange(1, len(right) + 1)
    recall = np.cumsum(right)/len(objects)
    pairs = list(zip(precision, recall))
    best_at = [max((p for p, q in pairs if q >= r - 1e-12), default=0)
               for r in np.linspace(0, 1, 101)]
    return np.mean(best_at)


@pytest.mark.parametrize('seed', range(4))
def test_ap_is_counted(seed):
    "Against the definition, on random boxes in three images and labels moved by some pixels."
    rng = np.random.default_rng(seed)
    def whole(low, high, n): return [float(v) for v in rng.integers(low, high, n)]
    def box(): return whole(0, 60, 2) + whole(8, 40, 2)
    def moved(b): return [b[k] + v for k, v in enumerate(whole(-4, 5, 2))] + b[2:]
    def place(): return int(rng.integers(3)), int(rng.choice((3, 7)))
    labels = [(*place(), box()) for _ in range(12)]
    found = [(i, c, moved(b), rng.random()) for i, c, b in labels if rng.random() < .8]
    found += [(*place(), box(), rng.random()) for _ in range(6)]
    objects = [thing(i, b, c) for i, c, b in labels]
    coco = coco_index(coco_content([(100, 100)]*3, objects))
    dicts = [dict(image_id=i, category_id=c, bbox=b, score=s) for i, c, b, s in found]
    ours = average_precision(coco, dicts)
    slow = {}
    for level in [round(.5 + .05*k, 2) for k in range(10)]:
        for c in (3, 7):
            wanted = [(i, b) for i, k, b in labels if k == c]
            said = [(i, b, s) for i, k, b, s in found if k == c]
            slow[level, c] = slow_class_ap(wanted, said, level)
    def mean(level=None, c=None):
        "Over those of an overlap, or of a class."
        return 100*np.mean([v for (t, k), v in slow.items() if level in (None, t) and c in (None, k)])
    assert ours['ap'] == pytest.approx(mean(), abs=1e-6)
    assert ours['ap50'] == pytest.approx(mean(.5), abs=1e-6)
    assert ours['ap75'] == pytest.approx(mean(.75), abs=1e-6)
    for c in (3, 7):
        assert ours['classes'][f'class {c}'] == pytest.approx(mean(c=c), abs=1e-6)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_crowds_and_difficult_objects_count_neither_way(kind):
    "A detection on them is no mistake, missing them is none; unmarked, both would cost."
    def found(x, y, w, h, score):
        square = np.zeros((100, 100))
        square[y:y+h, x:x+w] = 1
        said = dict(image_id=0, category_id=3, bbox=[x, y, w, h], score=score)
        return said | dict(segmentation=encode_mask(square))
    def score(marks, on_it):
        objects = [thing(0, (0, 0, 40, 40)), thing(0, (50, 50, 40, 40), **marks)]
        coco = coco_index(coco_content([(100, 100)], objects, (3,)))
        said = [found(0, 0, 40, 40, .5)] + [found(50, 50, 40, 40, .9)]*on_it
        return average_precision(coco, said, kind)['ap']
    for mark in ('iscrowd', 'difficult'):
        assert [score({mark: 1}, n) for n in (0, 1)] == pytest.approx([100, 100])
    assert score({}, 1) == pytest.approx(100)
    assert score({}, 0) == pytest.approx(100*51/101)


def test_ap_of_nothing():
    "Nothing found is 0, nothing to find refused, a class without objects not in the mean."
    coco = coco_index(coco_content([(50, 50)], [thing(0, (0, 0, 20, 20))]))
    assert average_precision(coco, [])['ap'] == 0
    found = [dict(image_id=0, category_id=3, bbox=[0, 0, 20, 20], score=1.)]
    classes = average_precision(coco, found)['classes']
    assert classes == {'class 3': pytest.approx(100), 'class 7': None}
    with pytest.raises(ValueError, match='no object to find'):
        average_precision(coco_index(coco_content([(50, 50)], [])), [])


class Oracle(nn.Module):
    "Gives the ground truth of the images it is shown, which it knows by their pixels."
    def __init__(self, data, masks=True):
        super().__init__()
        self.data, self.weight = data, nn.Parameter(torch.zeros(1))
        predictor = SimpleNamespace(cls_score=nn.Linear(1, len(data.classes) + 1))
        self.roi_heads = SimpleNamespace(box_predictor=predictor, has_mask=lambda: masks)
    def labels(self, image):
        "Of the one image with these pixels."
        known = [self.data[i] for i in range(len(self.data))]
        same = (t for x, t in known if x.shape == image.shape and (x.float()/255 == image).all())
        return next(same)
    def forward(self, images):
        found = [self.labels(image) for image in images]
        return [dict(boxes=t['boxes'], labels=t['labels'],
                     scores=torch.ones(len(t['labels'])),
                     masks=t['masks'][:, None].float()) for t in found]


@pytest.mark.parametrize('batch', [1, 3])
def test_ground_truth_scores_100(scenes, batch):
    "Through encoding, ids, boxes and masks, in batches that don't divide the images."
    _, val = open_objects(scenes)
    score = evaluate(Oracle(val), val, batch)
    assert [score[n] for n in ('box_ap', 'mask_ap75')] == pytest.approx([100, 100])
    found = [v for s in score['classes'].values() for v in s.values()]
    assert all(v is None or v == pytest.approx(100) for v in found)


def test_category_ids_with_gaps(tmp_path):
    "Ids 3 and 7, given in the wrong order, come back as they were; nor are image ids positions."
    sizes = [(40, 50), (50, 40)]
    save_images(tmp_path, sizes)
    things = [thing(40, (2, 3, 20, 30), 7), thing(10, (5, 5, 12, 30), 3)]
    content = coco_content(sizes, things, (7, 3))
    for image, i in zip(content['images'], (40, 10)): image['id'] = i
    data = Objects(tmp_path, content)
    perfect = dict(box_ap=pytest.approx(100), mask_ap=pytest.approx(100))
    assert evaluate(Oracle(data), data)['classes'] == {n: perfect for n in data.classes}


def test_difficult_objects_of_voc(tmp_path):
    "Are learned, not counted: their class has no AP."
    objects = [thing(0, (0, 0, 40, 30), 12), thing(0, (10, 5, 10, 10), 8, difficult=1)]
    categories = [dict(id=i+1, name=n) for i, n in enumerate(voc_classes)]
    content = coco_content([(30, 40)], objects) | dict(categories=categories)
    found = [dict(image_id=0, category_id=12, bbox=[0, 0, 40, 30], score=.9),
             dict(image_id=0, category_id=8, bbox=[10, 5, 10, 10], score=.9)]
    classes = average_precision(coco_index(content), found)['classes']
    assert classes['dog'] == pytest.approx(100) and classes['cat'] is None


# What goes in

def test_flips_take_boxes_and_masks_along(scenes):
    "Every item is an image as it is or mirrored, its boxes and masks with it; both occur."
    data, _ = open_objects(scenes)
    draws, flipped = Draws(data, 5), []
    for p in range(12):
        image, target = draws[p]
        original = data[draws.place(p)]
        flipped.append(not torch.equal(original[0], image))
        assert torch.equal(image, original[0].flip(2) if flipped[-1] else original[0])
        masks = original[1]['masks']
        assert torch.equal(target['masks'], masks.flip(2) if flipped[-1] else masks)
        exact = masks_to_boxes(target['masks']) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(target['boxes'], exact)
        assert torch.equal(target['labels'], original[1]['labels'])
    assert 0 < sum(flipped) < 12
    for p in (9, 2):
        again = Draws(data, 5)[p][1]
        for n, v in draws[p][1].items(): assert torch.equal(v, again[n])
    assert not all(torch.equal(Draws(data, 6)[p][0], draws[p][0]) for p in range(6))
    assert sorted(draws.place(p) for p in range(6, 12)) == list(range(6))


def test_grey_images_of_odd_sizes(tmp_path):
    "Are trained on and scored; what is found lies inside the image, masks have its size."
    sizes = [(37, 61), (90, 31), (50, 50)]
    save_images(tmp_path, sizes, 'L')
    things = [thing(0, (5, 5, 30, 20)), thing(1, (3, 40, 25, 40), 7)]
    data = Objects(tmp_path, coco_content(sizes, things))
    c = tiny(tmp_path/'run', batch=3)
    model = detector(c, 2)
    assert all(np.isfinite(line['loss']) for line in fine_tune(model, data, c))
    model.roi_heads.score_thresh = 0.
    for i, (h, w) in enumerate(sizes):
        assert data.image(i).shape == (3, h, w)
        found, = predict(model, [data.image(i)])
        assert len(found['boxes']) and found['masks'].shape[1:] == (h, w)
        assert found['masks'].dtype == torch.bool and (found['boxes'] >= 0).all()
        assert (found['boxes'] <= torch.tensor([w, h, w, h])).all()
    assert evaluate(model, data)['box_ap'] >= 0


def test_samples_are_a_function_of_the_item():
    "Whatever was drawn before and stands beside it; as many as torchvision takes."
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
    rng = torch.Generator().manual_seed(0)
    labels = [torch.randint(-1, 3, (n,), generator=rng) for n in (90, 200, 7, 400)]
    plain = BalancedPositiveNegativeSampler(64, .25)
    transform = SimpleNamespace(seeds=[5, 6, 7, 8])
    ours = ItemSampler(plain, transform, 1)
    positive, negative = ours(labels)
    assert ours.positive == sum(p.sum() for p in positive)
    assert ours.taken - ours.positive == sum(n.sum() for n in negative)
    for theirs, mine in zip(plain(labels), (positive, negative)):
        assert [int(t.sum()) for t in theirs] == [int(m.sum()) for m in mine]
    for own, p, n in zip(labels, positive, negative):
        assert (own[p.bool()] >= 1).all() and (own[n.bool()] == 0).all()
    for order in ([1], [3, 0], [2, 3, 1]):
        torch.rand(3)
        transform.seeds = [5 + i for i in order]
        some = ours([labels[i] for i in order])
        for masks, all_masks in zip(some, (positive, negative)):
            assert all(torch.equal(m, all_masks[i]) for i, m in zip(order, masks))
    transform.seeds = [5, 6, 7, 8]
    assert not torch.equal(ItemSampler(plain, transform, 2)(labels)[1][3], negative[3])


def test_size_is_a_function_of_the_item(scenes, tmp_path):
    "All of the recipe's occur; the largest in scoring; torchvision's choice without an item."
    data, _ = open_objects(scenes)
    model, draws = detector(tiny(tmp_path, shortest=64, short=128)).train(), Draws(data)
    def short_sides(items):
        images, targets = to_device(*zip(*[draws[p] for p in items]), 'cpu')
        return [min(size) for size in model.transform(images, targets)[0].image_sizes]
    sides = short_sides(range(30))
    assert set(sides) == {64, 96, 128}
    torch.rand(3)
    assert short_sides([20, 3, 7]) == [sides[i] for i in (20, 3, 7)]
    assert min(model.eval().transform([torch.rand(3, 64, 64)])[0].image_sizes[0]) == 128
    image, target = data[0]
    bare = {n: v.as_subclass(torch.Tensor) for n, v in target.items()}
    torch.manual_seed(0)
    def loss():
        with torch.no_grad(): return sum(model.train()([image.float()/255], [bare]).values())
    losses = [loss().item() for _ in range(6)]
    assert len(set(losses)) > 1


# The detector

@pytest.mark.parametrize('name,stride,strides', [
    ('resnet50', None, [4, 8, 16, 32]),
    ('resnet18', 16, [4, 8, 16]),
    ('shufflenet_v2_x1_0', 8, [4, 8]),
    ('mobilenet_v3_small', None, [4, 8, 16, 32])])
def test_pyramid_strides(name, stride, strides):
    "The maps have their strides, the last twice the last; a backbone stays as it was."
    backbone = make_backbone(name, stride)
    before = copy.deepcopy(backbone.state_dict())
    pyramid = Pyramid(backbone, 16).eval()
    assert pyramid.strides == strides
    with torch.no_grad(): maps = pyramid(torch.zeros(1, 3, 128, 192)).values()
    expected = [(16, 128//s, 192//s) for s in (*strides, 2*strides[-1])]
    assert [m.shape[1:] for m in maps] == expected
    after = pyramid.backbone.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_network_that_cannot_be_taken_apart():
    "Gives its one map."
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.side = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(3, 6, 8, 8)
        def forward(self, x): return self.down(x) + self.side(x)
    assert stage_maps(Whole()) == ({8: ('', 6)}, [''])
    maps = Pyramid(Whole(), 4)(torch.zeros(2, 3, 64, 64)).values()
    assert [tuple(m.shape) for m in maps] == [(2, 4, 8, 8), (2, 4, 4, 4)]


def unusual_backbone():
    "One whose batch norms have statistics, scales and shifts of their own."
    backbone = make_backbone('shufflenet_v2_x0_5', 8)
    for m in backbone.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        m.running_mean.uniform_(-.1, .1)
        m.running_var.uniform_(.5, 2.)
        nn.init.uniform_(m.weight, .5, 2.)
    return backbone.eval()


@pytest.mark.parametrize('norm', ['sync', 'batch', 'frozen'])
def test_batch_norm(scenes, tmp_path, norm):
    """Frozen: statistics, scale and shift stay those of the backbone, none in the pyramid.

    Otherwise both are trained, without weight decay."""
    data, _ = open_objects(scenes)
    c = tiny(tmp_path, norm=norm)
    backbone, x = unusual_backbone(), torch.randn(1, 3, 64, 64)
    with torch.no_grad(): expected = backbone(x)
    state = {n: t for n, t in backbone.state_dict().items() if 'num_batches' not in n}
    own = copy.deepcopy(state)
    model = make_detector(backbone, 8, c)
    body = model.backbone.backbone
    with torch.no_grad(): torch.testing.assert_close(body.eval()(x), expected)
    kinds = dict(sync=SharedBatchNorm, batch=nn.BatchNorm2d, frozen=FrozenBatchNorm2d)
    kind = kinds[norm]
    norms = [n for n, m in model.named_modules() if type(m) is kind]
    assert any('backbone.backbone' in n for n in norms)
    assert any('fpn' in n for n in norms) == (norm != 'frozen')
    optimizer = make_optimizer('sgd', parameter_groups(model), c.lr, c.weight_decay)
    groups = optimizer.param_groups
    of_norms = {id(p) for n in norms for p in model.get_submodule(n).parameters()}
    assert {id(p) for p in groups[1]['params']} == of_norms
    assert groups[1]['weight_decay'] == 0 < groups[0]['weight_decay']
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))
    fine_tune(model, data, c)
    now = model.backbone.backbone.state_dict()
    of_bn = [n for n in own if f'backbone.backbone.{n.rpartition(".")[0]}' in norms]
    assert of_bn and all(torch.equal(now[n], own[n]) == (norm == 'frozen') for n in of_bn)
    assert not torch.equal(now['conv1.0.weight'], own['conv1.0.weight'])


def test_statistics_anew(scenes, tmp_path):
    "The mean over the batches of the inputs' mean, whenever it is done; nothing else changes."
    data, _ = open_objects(scenes)
    c = tiny(tmp_path, precise_bn=3, short=96)
    model, seen = detector(c), []
    before = copy.deepcopy(model.state_dict())
    first = model.backbone.backbone.get_submodule('conv1.1')
    hook = first.register_forward_pre_hook(lambda m, x: seen.append(x[0].mean((0, 2, 3))))
    precise_bn(model, data, c)
    hook.remove()
    after = copy.deepcopy(model.state_dict())
    assert len(seen) == 3
    mean = after['backbone.backbone.conv1.1.running_mean']
    torch.testing.assert_close(mean, torch.stack(seen).mean(0))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all('running' in n or 'num_batches' in n for n in changed)
    precise_bn(model, data, c)
    assert all(torch.equal(t, after[n]) for n, t in model.state_dict().items())


def test_classes_must_agree(scenes, tmp_path):
    "In training and in scoring."
    data, val = open_objects(scenes)
    c = tiny(tmp_path)
    model = detector(c, 3)
    for do in (lambda: fine_tune(model, data, c), lambda: evaluate(model, val)):
        with pytest.raises(ValueError, match='tells 3 classes apart, the data have 8: ball, crate'):
            do()


def test_nothing_to_learn(scenes, tmp_path):
    "Images without any object train the proposals only."
    path = scenes/'annotations'/'instances_train.json'
    content = json.loads(path.read_text()) | dict(annotations=[])
    data, c = Objects(scenes/'train', content), tiny(tmp_path)
    log = fine_tune(detector(c), data, c)
    last = log[-1]
    assert last['mask'] == last['box_reg'] == last['rpn_box_reg'] == 0 < last['objectness']


def test_half_precision(scenes, tmp_path):
    "bf16 trains on a CPU, too, close to float32; fp16 needs a GPU."
    data, _ = open_objects(scenes)
    losses = []
    for amp in PRECISIONS:
        c = tiny(tmp_path/amp, iterations=1, amp=amp)
        losses.append(fine_tune(detector(c), data, c)[0]['loss'])
    full, half = losses
    assert full != half == pytest.approx(full, rel=.1)
    if torch.cuda.is_available(): return
    c = tiny(tmp_path/'fp16', amp='fp16')
    with pytest.raises(ValueError, match='needs a GPU'): fine_tune(detector(c), data, c)


def test_boxes_only(scenes, tmp_path):
    "VOC has no masks: a Faster R-CNN, without a loss for them."
    data, _ = open_objects(scenes, masks=False)
    c = tiny(tmp_path, masks=False)
    log = fine_tune(detector(c), data, c)
    assert 'mask' not in log[0] and 'mask_ap' not in evaluate(detector(c), data)


# Parameters

def test_learning_rate():
    "Field's 1x: warm-up over 1,000 steps, a tenth after 60,000 and 80,000; by batch size."
    def field(**given): return configure_detect(recipe='1x', **given)
    rates = [detect_rate(k, field()) for k in (0, 500, 1000, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([2e-5, .02*.5005, .02, .02, .002, .0002])
    rates = [field(batch=4, **g).lr for g in ({}, dict(lr=.02))]
    assert rates == pytest.approx([.005, .02])
    assert configure_detect(optimizer='sgd').lr == pytest.approx(.01)
    assert field(optimizer='adamw').weight_decay == 1e-2
    assert rate_falls(configure_detect(recipe='VOC')) == [18_000, 22_000]


def test_recipes_name_parameters():
    "Every value of a recipe is a parameter's, of its type."
    kinds = {f.name: f.type for f in fields(DetectConfig)}
    for name, values in DETECT_RECIPES.items():
        assert all(type(v) is kinds[n] for n, v in values.items())
        assert configure_detect(recipe=name).recipe == name


@pytest.mark.parametrize('wrong,message', [
    (dict(iteration=3), "unknown parameter 'iteration', did you mean 'iterations'"),
    (dict(checkpont='x'), "unknown parameter 'checkpont', did you mean 'checkpoint'"),
    (dict(milestones=(.5,)), 'milestones must be a word'),
    (dict(milestones='8/9,2/3'), "must be rising fractions between 0 and 1, .* got '8/9,2/3'"),
    (dict(batch=0), 'batch must be at least 1, got 0'),
    (dict(lr='fast'), "lr must be a number, got 'fast'"),
    (dict(masks='perhaps'), "masks must be on or off, got 'perhaps'"),
    (dict(norm='layer'), "norm must be one of 'sync', 'batch', 'frozen', got 'layer'"),
    (dict(recipe='3x'), "recipe must be one of 'auto', '1x', '2x', 'VOC', 'small', got '3x'"),
    (dict(short=500), 'sizes must be shortest <= short <= longest, got 128, 500, 192'),
    (dict(checkpoint='x', stride=8), 'stride is that of the checkpoint'),
    (dict(checkpoint='/no/run'), "'/no/run' is no run folder"),
    (dict(amp='half'), 'amp must be one of'),
    (dict(out=f'{__file__}/x'), "can't be written: .* is a file"),
])
def test_wrong_parameters_are_refused(wrong, message):
    errors = ValueError, TypeError, FileNotFoundError
    with pytest.raises(errors, match=message): configure_detect(**wrong)


def test_voc_recipe(tmp_path):
    "A VOCdevkit is known by its folders; it has no masks, and asking for them is an error."
    (tmp_path/'VOC2007').mkdir()
    c = configure_detect(data=tmp_path)
    assert (c.recipe, c.masks) == ('VOC', False)
    assert not configure_detect(data=tmp_path, recipe='1x').masks
    with pytest.raises(ValueError, match='VOC is read without masks'):
        configure_detect(data=tmp_path, masks=True)


def test_how_many_images(tmp_path, scenes):
    "As the recipe says; another seed learns from other scenes and scores on the same."
    def opened(name, **given):
        return learn_and_score(configure_detect(out=tmp_path/name, **given))
    def built_in(name, seed): return opened(name, labelled=3, test=2, seed=seed)
    (a, va), (b, vb), (again, _) = built_in('a', 0), built_in('b', 1), built_in('c', 0)
    assert (len(a), len(va)) == (3, 2) and torch.equal(a.image(0), again.image(0))
    assert not torch.equal(a.image(0), b.image(0))
    assert torch.equal(va.image(1), vb.image(1))
    given = dict(data=scenes, recipe='small', labelled=4, test=3)
    some, val = opened('unused', **given)
    assert len(set(some.ids)) == 4 and len(val) == 3 and not (tmp_path/'unused').exists()
    assert opened('unused', seed=1, **given)[1].ids == val.ids
    with pytest.raises(ValueError, match='number of training images with objects, 6, got 7'):
        opened('unused', **given | dict(labelled=7))


def test_comparison(tmp_path):
    "Is a run of its own, before the other, in its own folder; else its parameters are the same."
    c = replace(tiny(tmp_path), checkpoint='runs/x', compare=True)
    runs = with_comparison(c)
    assert list(runs) == ['result-random.json', 'result.json']
    assert runs['result.json'] is c
    random = replace(c, checkpoint='', compare=False, out=str(tmp_path/'random'))
    assert runs['result-random.json'] == random
    assert list(with_comparison(tiny(tmp_path))) == ['result.json']
    assert not configure_detect(compare=True).compare


# A run that is cut off

class Breaks:
    "Data that fail at the nth item asked for."
    def __init__(self, data, n): self.data, self.n = data, n
    def __len__(self): return len(self.data)
    def __getattr__(self, name): return getattr(self.data, name)
    def __getitem__(self, i):
        self.n -= 1
        if self.n < 0: raise KeyboardInterrupt
        return self.data[i]


def broken_off(data, config, step):
    "Trains up to a step, with a checkpoint after each."
    often = replace(config, save_minutes=0.)
    breaks = Breaks(data, step*config.batch)
    with pytest.raises(KeyboardInterrupt): fine_tune(detector(config), breaks, often)


def timeless(log):
    times = ('seconds', 'images_per_s')
    return [{n: v for n, v in line.items() if n not in times} for line in log]


def same(a, b):
    "Two run folders hold the same weights, optimizer and lines of the log."
    one, two = (torch.load(p/'checkpoint.pt', weights_only=True) for p in (a, b))
    for n, t in one['model'].items(): assert torch.equal(t, two['model'][n]), n
    for k, state in one['optimizer']['state'].items():
        theirs = two['optimizer']['state'][k]
        for n, v in state.items(): assert torch.equal(v, theirs[n]), n
    assert one['step'] == two['step']
    assert str(timeless(read_log(a))) == str(timeless(read_log(b)))


cases = [('off', 'adamw'), ('off', 'sgd'), ('bf16', 'adamw')]

@pytest.mark.parametrize('amp,optimizer', cases)
def test_interrupted_run_ends_the_same(scenes, tmp_path, amp, optimizer):
    "Broken off in step 8, continued from step 7: weights and losses to the last bit."
    data, _ = open_objects(scenes)
    given = dict(iterations=9, short=96, warmup=3, amp=amp, optimizer=optimizer)
    whole, cut = tiny(tmp_path/'whole', **given), tiny(tmp_path/'cut', **given)
    model = detector(whole)
    log = fine_tune(model, data, whole)
    broken_off(data, cut, 7)
    assert torch.load(tmp_path/'cut'/'checkpoint.pt', weights_only=True)['step'] == 7
    for other, now, message in ((data, replace(cut, seed=1), 'seed 0, now 1'),
                                (data.take(5), cut, 'images')):
        with pytest.raises(ValueError, match=message): fine_tune(detector(cut), other, now)
    torch.rand(7)                                                  # another state of the generator
    resumed = detector(cut, seed=3)
    log_again = fine_tune(resumed, data, cut)
    same_weights(resumed, model)
    assert timeless(log_again) == timeless(log)
    assert [line['step'] for line in log] == list(range(1, 10))
    assert log_again[-1]['seconds'] >= log_again[0]['seconds'] > 0
    same(tmp_path/'whole', tmp_path/'cut')


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_another_precision_goes_on(scenes, tmp_path, optimizer):
    "Begun in float32, ended in bf16 and the other way round: the loss stays near."
    data, _ = open_objects(scenes)
    c = tiny(tmp_path/'whole', iterations=4, optimizer=optimizer, lr=1e-3)
    expected = fine_tune(detector(c), data, c)
    for first, second in (PRECISIONS, PRECISIONS[::-1]):
        one = replace(c, out=str(tmp_path/first), amp=first)
        broken_off(data, one, 2)
        log = fine_tune(detector(one, seed=3), data, replace(one, amp=second))
        assert [line['step'] for line in log] == [1, 2, 3, 4]
        losses = [line['loss'] for line in log]
        assert losses == pytest.approx([line['loss'] for line in expected], rel=.1)


spoilers = dict(cut=lambda b: b[:len(b)//2], empty=lambda b: b'', noise=lambda b: b[::-1])

@pytest.mark.parametrize('spoil', spoilers.values(), ids=spoilers)
def test_damaged_checkpoint(scenes, tmp_path, spoil):
    "It is set aside with a warning, the one before is used, and the end is the same."
    data, _ = open_objects(scenes)
    whole, cut = (tiny(tmp_path/n, iterations=4) for n in ('whole', 'cut'))
    fine_tune(detector(whole), data, whole)
    broken_off(data, cut, 3)
    newest = tmp_path/'cut'/'checkpoint.pt'
    newest.write_bytes(spoil(newest.read_bytes()))
    message = 'truncated or not a checkpoint .* checkpoint.damaged, and the one before is used'
    with pytest.warns(UserWarning, match=message):
        fine_tune(detector(cut), data, cut)
    assert (tmp_path/'cut'/'checkpoint.damaged').exists()
    same(tmp_path/'whole', tmp_path/'cut')


def test_first_edition(scenes, tmp_path):
    "Its checkpoints are refused by name, not set aside as damaged."
    data, _ = open_objects(scenes)
    old, c = dict(about=dict(seed=0), step=10, log=[], model={}), tiny(tmp_path)
    torch.save(old, tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='first edition'): fine_tune(detector(c), data, c)
    assert (tmp_path/'checkpoint.pt').exists()


def test_steps_that_are_not_finite(scenes, tmp_path):
    "Change nothing, are named, and ten in a row stop the run."
    data, _ = open_objects(scenes)
    c = tiny(tmp_path, iterations=12)
    model = detector(c)
    with torch.no_grad(): model.roi_heads.box_predictor.cls_score.bias.fill_(float('nan'))
    before = {n: p.clone() for n, p in model.named_parameters()}
    message = '10 steps in a row, up to step 10, were not finite: lower lr'
    with pytest.raises(FloatingPointError, match=message):
        fine_tune(model, data, c)
    finite = {n: p for n, p in model.named_parameters() if p.isfinite().all()}
    assert len(finite) == len(before) - 1
    assert all(torch.equal(p, before[n]) for n, p in finite.items())
    lines = read_lines(tmp_path/'skipped.jsonl')
    assert [line['step'] for line in lines] == list(range(1, 11))
    draws = Draws(data)
    assert lines[3]['images'] == [f'{draws.place(p):06d}.png' for p in own_items(3, 2)]


def words(data, out, **given):
    "A command line of a run that takes a second."
    given = {**TINY, 'data': data, 'recipe': 'small', 'test': 1, 'iterations': 24,
             'save_minutes': 0, 'out': out, **given}
    return ['-m', 'pixcon.detect', *(f'--{n}={v}' for n, v in given.items())]


def start(*command, **kwargs):
    "A Python process with one thread, whose output is collected."
    return subprocess.Popen([sys.executable, *command], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


@pytest.mark.parametrize('amp', PRECISIONS)
def test_killed_at_random_moments(scenes, tmp_path, amp):
    "SIGKILL at any moment; the same command again ends with the same bits."
    begun = time.time()
    whole = start(*words(scenes, tmp_path/'whole', amp=amp))
    assert whole.wait(120) == 0, whole.stdout.read()
    took, rng, kills = time.time() - begun, np.random.default_rng(0), 0
    wanted, killed = KILLS if amp == 'off' else max(KILLS//3, 1), tmp_path/'killed'
    for _ in range(10*wanted):
        run = start(*words(scenes, killed, amp=amp))
        if kills == wanted:
            assert run.wait(120) == 0
            break
        lines, until = len(read_log(killed)), time.time() + 2*took
        def quiet(): return run.poll() is None and len(read_log(killed)) <= lines
        while quiet() and time.time() < until: time.sleep(.01)
        time.sleep(rng.uniform(0, .3))
        if run.poll() is None:
            run.kill()
            kills += 1
        run.wait()
        if run.returncode == 0 and kills < wanted: killed.rename(tmp_path/f'ended{kills}')
    for folder in (killed, *tmp_path.glob('ended*')): same(tmp_path/'whole', folder)
    results = [tmp_path/n/'result.json' for n in ('whole', 'killed')]
    results = [json.loads(path.read_text()) for path in results]
    for r in results: del r['seconds'], r['settings']['out']
    assert results[0] == results[1]


def test_full_disk(scenes, tmp_path):
    "A clear message, the old checkpoint intact, no half file left; with room it goes on."
    data, _ = open_objects(scenes)
    given = dict(iterations=4, data=scenes, recipe='small', test=1)
    whole, full = tiny(tmp_path/'whole', **given), tiny(tmp_path/'full', **given)
    fine_tune(detector(whole), data, whole)
    broken_off(data, full, 2)
    path, most = tmp_path/'full'/'checkpoint.pt', 100_000
    old = path.read_bytes()
    assert len(old) > most
    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    run = start(*words(scenes, tmp_path/'full', iterations=4), preexec_fn=small)
    said = run.communicate(timeout=120)[0]
    assert run.returncode != 0 and 'Traceback' not in said, said
    assert 'could not be written' in said and 'Is the disk full?' in said, said
    assert said.splitlines()[-1].startswith('pixcon.detect: '), said
    assert path.read_bytes() == old and not list(path.parent.glob('*.part'))
    fine_tune(detector(full), data, full)
    same(tmp_path/'whole', tmp_path/'full')


# A run that is shared

def test_parts_of_a_step(monkeypatch):
    "Each item of a step goes to one process; the parts are equal or refused."
    items = []
    monkeypatch.setattr(detect, 'world', lambda: 3)
    for r in range(3):
        monkeypatch.setattr(detect, 'rank', lambda: r)
        items += own_items(5, 12)
    assert items == list(range(60, 72))
    message = "batch 8 can't be cut into 3 equal parts"
    with pytest.raises(ValueError, match=message): own_items(0, 8)


@pytest.mark.parametrize('cuts', [(1, 3), (2, 2), (1, 1, 2)])
def test_losses_of_parts_add_up(scenes, tmp_path, cuts):
    "Weighted by their samples they are those of the whole, one image without objects in it."
    data, _ = open_objects(scenes)
    model = detector(tiny(tmp_path, norm='frozen', rois=64)).train()
    images, targets = to_device(*zip(*[Draws(data)[p] for p in range(4)]), 'cpu')
    targets[1] = {n: v[:0] if v.ndim else v for n, v in targets[1].items()}
    with torch.no_grad(): whole, total = model(images, targets), sample_counts(model)
    summed, first = {n: 0. for n in whole}, 0
    for n in cuts:
        part = slice(first, first + n)
        with torch.no_grad(): losses = model(images[part], targets[part])
        for name, count in sample_counts(model).items():
            summed[name] += count*losses[name]/total[name]
        first += n
    for name, loss in whole.items():
        torch.testing.assert_close(summed[name], loss, rtol=1e-5, atol=1e-7)


SHARED = '''
import json, sys, torch
from pixcon.detect import *
from pixcon.distributed import join, leave, rank, world
torch.set_num_threads(1)
''' + '\n' + inspect.getsource(Breaks) + '''
def run(given, name, cut=0):
    config = configure_detect(**given, out=f'{sys.argv[2]}/{name}-{world()}')
    train, test = learn_and_score(config)
    if cut:
        breaks = Breaks(train, cut*config.batch//world())
        try: fine_tune(build_detector(config, 8), breaks, config)
        except KeyboardInterrupt: pass
    model = build_detector(config, 8)
    log = fine_tune(model, train, config)
    precise_bn(model, train, config)
    torch.save(dict(model=model.state_dict(), log=log), f'{config.out}-{rank()}.pt')
    return model, test

if int(sys.argv[3]) > 1: join()
for name, given in json.loads(sys.argv[1]).items():
    run(given, name)
    model, test = run(given, name + '-cut', 2)
model = build_detector(configure_detect(**json.loads(sys.argv[1])['frozen-off']), 8)
state = torch.load(f'{sys.argv[2]}/frozen-off-1-0.pt', weights_only=True)['model']
model.load_state_dict(state)
model.roi_heads.score_thresh = 0.
scores = {n: (detections(model, test, n), evaluate(model, test, n)) for n in (1, 3)}
torch.save(scores, f'{sys.argv[2]}/scores-{world()}-{rank()}.pt')
leave()
'''


@pytest.fixture(scope='module')
def shared_runs(scenes, tmp_path_factory):
    "The same runs by one process and by two, whole and cut off; what each ended with."
    folder = tmp_path_factory.mktemp('shared')
    (folder/'shared.py').write_text(SHARED)
    common = {**TINY, 'data': str(scenes), 'recipe': 'small', 'iterations': 4, 'batch': 4,
              'save_minutes': 0, 'optimizer': 'sgd', 'lr': .01, 'rois': 64}
    runs = {f'frozen-{amp}': common | dict(norm='frozen', amp=amp) for amp in PRECISIONS}
    runs['sync'] = common | dict(norm='sync', precise_bn=2, amp='off')
    for n in (1, 2):
        torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}']
        script = [str(folder/'shared.py'), json.dumps(runs), str(folder), str(n)]
        run = start(*(torchrun if n > 1 else []), *script)
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 0, said
    return lambda name: torch.load(folder/f'{name}.pt', weights_only=True)


@pytest.mark.parametrize('name', ['frozen-off', 'frozen-bf16', 'sync'])
def test_two_processes_agree(shared_runs, name):
    "Weights and statistics are the same bits on both, also when cut off and continued."
    ends = ((name, 0), (name, 1), (f'{name}-cut', 1))
    first, second, cut = (shared_runs(f'{n}-2-{r}') for n, r in ends)
    assert timeless(first['log']) == timeless(second['log']) == timeless(cut['log'])
    for n, t in first['model'].items():
        assert torch.equal(t, second['model'][n]) and torch.equal(t, cut['model'][n]), n


@pytest.mark.parametrize('amp,bound', [('off', 2e-6), ('bf16', 1e-2)])
def test_two_processes_are_one(shared_runs, amp, bound):
    """Without batch statistics, images of one size: all losses of the first four steps.

    float32: the same sums in another order, 1e-7 a number, and three steps of training.
    bf16: each process rounds its gradients to 8 bits (4e-3) before they are averaged."""
    one, two = (shared_runs(f'frozen-{amp}-{n}-0') for n in (1, 2))
    assert len(one['log']) == len(two['log']) == 4
    for a, b in zip(timeless(one['log']), timeless(two['log'])):
        assert a == pytest.approx(b, rel=bound, abs=1e-7)
    assert one['log'][0]['loss'] == pytest.approx(two['log'][0]['loss'], rel=1e-6)
    for n, t in one['model'].items():
        torch.testing.assert_close(two['model'][n], t, atol=bound/10, rtol=bound)


def test_two_processes_share_batch_statistics(shared_runs):
    "With batch norm trained: the first loss is that of one process, the next ones but for what training makes of noise."
    one, two = (shared_runs(f'sync-{n}-0') for n in (1, 2))
    assert one['log'][0]['loss'] == pytest.approx(two['log'][0]['loss'], rel=1e-4)
    for a, b in zip(one['log'], two['log']): assert a['loss'] == pytest.approx(b['loss'], rel=2e-2)


@pytest.mark.parametrize('batch', [1, 3])
def test_two_processes_score_as_one(shared_runs, batch):
    "Every detection, in the same order, to the last bit, and so every score, on both."
    names = ('scores-1-0', 'scores-2-0', 'scores-2-1')
    (one, score), (first, score_1), (second, score_2) = (shared_runs(n)[batch] for n in names)
    assert len(one) > 50 and one == first == second
    assert score == score_1 == score_2 and score['box_ap'] >= 0


def test_two_processes_from_the_command_line(scenes, tmp_path):
    "Started as the notebook does: one result, one detector, the log of both."
    given = {**TINY, 'data': str(scenes), 'recipe': 'small', 'out': str(tmp_path/'run')}
    said = []
    launch('pixcon.detect', given, 2, said.append)
    assert sum('2 x cpu' in line for line in said) == 1
    result = json.loads((tmp_path/'run'/'result.json').read_text())
    assert result['settings']['iterations'] == 2 and len(read_log(tmp_path/'run')) == 2
    found, = predict(load_detector(tmp_path/'run'), [open_objects(scenes)[1].image(0)])
    assert set(found) == {'boxes', 'labels', 'scores', 'masks'}


# The notebook

NOTEBOOK = ROOT/'nbs'/'finetune_detect.ipynb'


def papermill(folder, **parameters):
    "Runs the notebook in a folder; returns the finished process."
    flags = [a for n, v in parameters.items() for a in ('-p', n, str(v))]
    env = {k: v for k, v in os.environ.items() if k not in not_given}
    command = ['papermill', NOTEBOOK, 'out.ipynb', '--no-progress-bar', *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True,
                          timeout=300)


def code_cells():
    "Source and tags of the notebook's code cells."
    cells = json.loads(NOTEBOOK.read_text())['cells']
    cells = [c for c in cells if c['cell_type'] == 'code']
    return [(''.join(c['source']), c['metadata'].get('tags', [])) for c in cells]


def test_notebook_offers_every_parameter():
    "The parameters cell has each field of the record, its type and meaning, and processes."
    cell, = (source for source, tags in code_cells() if 'parameters' in tags)
    offered = re.findall(r'^(\w+):(\w+) = .+?\s+# (.+)$', cell, re.M)
    expected = {(f.name, f.type.__name__, f.metadata['why']) for f in fields(DetectConfig)}
    expected |= {('processes', 'int', 'that share each batch, one for each GPU')}
    assert len(offered) == len(cell.splitlines())
    assert set(offered) == expected


def test_notebook_reads_as_a_report():
    "No cell besides the parameters is longer than twelve lines."
    for source, tags in code_cells():
        if 'parameters' not in tags: assert len(source.splitlines()) <= 12, source


def test_misspelt_parameter_stops_the_notebook(tmp_path):
    stopped = papermill(tmp_path, labeled=4)
    assert stopped.returncode != 0
    assert "unknown parameter 'labeled', did you mean 'labelled'?" in stopped.stderr
    assert not (tmp_path/'runs').exists()


FILES = {'checkpoint.pt', 'config.json', 'data', 'detector.safetensors', 'detections.png',
         'items.png', 'log.jsonl', 'loss.png', 'parts.png', 'result.json'}
KEYS = ['task', 'data', 'checkpoint', 'variant', 'seed', 'box_ap', 'box_ap50', 'box_ap75',
        'mask_ap', 'mask_ap50', 'mask_ap75', 'classes', 'seconds', 'recipe', 'settings']


def test_notebook_compares_a_run_with_random_weights(tmp_path):
    "From a run folder; both results are in one form; the weights were those of the run."
    from pixcon.training import Pretraining, configure
    given = dict(data='scenes', scenes=8, batch=4, epochs=1, hidden=16, dim=8, queue=8)
    given['out'] = str(tmp_path/'pre')
    training = Pretraining(*configure(**given))
    training.begin()
    training.run.save()
    done = papermill(tmp_path, checkpoint='pre', iterations=2, labelled=2, test=2, batch=2)
    assert done.returncode == 0, done.stderr[-3000:]
    folder, = (tmp_path/'runs').iterdir()
    assert folder.name == 'detect-scenes-pre-seed0'
    assert {p.name for p in folder.iterdir()} == FILES | {'result-random.json', 'random'}
    paths = [folder/f'result{n}.json' for n in ('', '-random')]
    result, random = (json.loads(path.read_text()) for path in paths)
    assert list(result) == list(random) == KEYS
    origins = [(r['checkpoint'], r['variant']) for r in (result, random)]
    assert origins == [('pre', 'sr'), ('', 'random')]
    assert list(result['classes']) == list(scene_classes[4:])
    assert result['settings']['iterations'] == 2
    assert 0 <= result['box_ap'] <= 100
    given = {n: v for n, v in TINY.items() if n != 'backbone'}
    c = configure_detect(**given, checkpoint=tmp_path/'pre', out=tmp_path/'x')
    backbone = build_detector(c, 8).backbone.backbone.state_dict()
    assert c.backbone == 'shufflenet_v2_x1_0' and c.stride == 8
    for n, t in training.model.online.backbone.state_dict().items():
        assert torch.equal(backbone[n], t)


def test_notebook_with_two_processes(tmp_path):
    "The same files; a second call with the same parameters trains nothing."
    given = dict(processes=2, iterations=2, labelled=2, test=2, batch=2, masks='off')
    done = papermill(tmp_path, **given, checkpoint='random', out='run')
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in (tmp_path/'run').iterdir()} == FILES
    result = json.loads((tmp_path/'run'/'result.json').read_text())
    assert result['mask_ap'] is None and result['settings']['masks'] is False
    assert '2 x cpu' in (tmp_path/'out.ipynb').read_text()
    del given['processes']
    train_and_score(**given, out=tmp_path/'run')
    assert len(read_log(tmp_path/'run')) == 1
