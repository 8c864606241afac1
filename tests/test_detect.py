"""Objects read and flipped, AP counted a second way, the detector's parts, training that continues, the notebook as a user runs it."""
import copy
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torchvision.ops import FrozenBatchNorm2d, box_iou, masks_to_boxes
from pixcon.scenes import Scenes, scene_classes
from pixcon.detect import (Draws, Pyramid, _optimizer, average_precision, configure_detect, detect_rate, evaluate, fine_tune,
                           learn_and_score, make_detector, predict, precise_bn, resolve_recipe, stage_maps)
from pixcon.objects import Objects, open_objects, read_voc, voc_classes, which_objects, write_coco
from pixcon.encoder import make_backbone

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "A COCO folder of built-in scenes: six to learn from, four to score."
    folder = tmp_path_factory.mktemp('scenes')
    write_coco(Scenes(6, 64, seed=1), folder)
    return write_coco(Scenes(4, 64, seed=2), folder, 'val')


def tiny(**given):
    "A recipe of the smallest kind."
    return resolve_recipe(**dict(width=8, hidden=16, mask_layers=1, proposals=20, rois=8, short=64, shortest=64, batch=2, iterations=2) | given)[1]


def detector(r, classes=8, seed=0):
    torch.manual_seed(seed)
    return make_detector(make_backbone('shufflenet_v2_x0_5', 8), classes, r)


def coco_content(sizes, annotations, ids=(3, 7)):
    "COCO's form for images of some sizes, and two categories."
    return dict(images=[dict(id=i, file_name=f'{i}.png', height=h, width=w) for i, (h, w) in enumerate(sizes)], annotations=annotations,
                categories=[dict(id=c, name=f'class {c}') for c in ids])


def thing(image, box, category=3, mask=True, **more):
    "One annotation with a box (left, top, width, height) and, as mask, the box's polygon."
    x, y, w, h = box
    return dict(image_id=image, category_id=category, bbox=list(box), area=w*h, iscrowd=0) | (dict(segmentation=[[x, y, x+w, y, x+w, y+h, x, y+h]]) if mask else {}) | more


def save_images(folder, sizes, mode='RGB'):
    for i, (h, w) in enumerate(sizes):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode).save(folder/f'{i}.png')


# Average precision

def slow_ap(truth, found, levels):
    "AP of each overlap and class by the definition: lists of (image, class, box) and (image, class, box, score), boxes as left, top, width, height."
    corners = lambda b: torch.tensor([[b[0], b[1], b[0] + b[2], b[1] + b[3]]], dtype=torch.float64)
    table = {}
    for level in levels:
        for c in sorted({t[1] for t in truth}):
            objects, free = [t for t in truth if t[1] == c], {i for i, t in enumerate(truth) if t[1] == c}
            right = []
            for image, _, box, _ in sorted((f for f in found if f[1] == c), key=lambda f: -f[3]):
                near = [(box_iou(corners(truth[i][2]), corners(box)).item(), i) for i in free if truth[i][0] == image]
                best = max(near, default=(0, None))
                right.append(best[0] >= level)
                if best[0] >= level: free.remove(best[1])
            precision = np.cumsum(right)/np.arange(1, len(right) + 1)
            recall = np.cumsum(right)/len(objects)
            table[level, c] = np.mean([max((p for p, q in zip(precision, recall) if q >= r - 1e-12), default=0) for r in np.linspace(0, 1, 101)])
    return table


@pytest.mark.parametrize('seed', range(4))
def test_ap_is_counted(seed):
    "Against the definition, on random boxes of two classes in three images, with copies of the truth moved by some pixels among them."
    rng = np.random.default_rng(seed)
    box = lambda: [float(v) for v in (*rng.integers(0, 60, 2), *rng.integers(8, 40, 2))]
    truth = [(int(rng.integers(3)), int(rng.choice((3, 7))), box()) for _ in range(12)]
    moved = lambda b: [b[0] + float(rng.integers(-4, 5)), b[1] + float(rng.integers(-4, 5)), *b[2:]]
    found = [(i, c, moved(b), rng.random()) for i, c, b in truth if rng.random() < .8] + [(int(rng.integers(3)), int(rng.choice((3, 7))), box(), rng.random()) for _ in range(6)]
    from pixcon.objects import _index
    coco = _index(coco_content([(100, 100)]*3, [thing(i, b, c) for i, c, b in truth]))
    ours = average_precision(coco, [dict(image_id=i, category_id=c, bbox=b, score=s) for i, c, b, s in found])
    levels = [round(.5 + .05*k, 2) for k in range(10)]
    slow = slow_ap(truth, found, levels)
    assert ours['ap'] == pytest.approx(100*np.mean(list(slow.values())), abs=1e-6)
    assert ours['ap50'] == pytest.approx(100*np.mean([v for (t, _), v in slow.items() if t == .5]), abs=1e-6)
    assert ours['ap75'] == pytest.approx(100*np.mean([v for (t, _), v in slow.items() if t == .75]), abs=1e-6)
    for c in (3, 7): assert ours['classes'][f'class {c}'] == pytest.approx(100*np.mean([v for (_, k), v in slow.items() if k == c]), abs=1e-6)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_crowds_and_difficult_objects_count_neither_way(kind):
    "A detection on them is no mistake, missing them is none; without the mark both would cost."
    from pixcon.objects import _index
    def score(marks, on_it):
        coco = _index(coco_content([(100, 100)], [thing(0, (0, 0, 40, 40)), thing(0, (50, 50, 40, 40), **marks)], (3,)))
        boxes = [(0, 0, 40, 40, .5)] + [(50, 50, 40, 40, .9)]*on_it
        square = [np.zeros((100, 100)) for _ in boxes]
        for m, (x, y, w, h, _) in zip(square, boxes): m[y:y+h, x:x+w] = 1
        from pixcon.objects import _encode
        return average_precision(coco, [dict(image_id=0, category_id=3, bbox=[x, y, w, h], score=s, segmentation=_encode(m)) for m, (x, y, w, h, s) in zip(square, boxes)], kind)['ap']
    for mark in ('iscrowd', 'difficult'): assert [score({mark: 1}, n) for n in (0, 1)] == pytest.approx([100, 100])
    assert score({}, 1) == pytest.approx(100) and score({}, 0) == pytest.approx(100*51/101)


def test_ap_of_nothing():
    "Nothing found is 0, nothing to find is refused, a class without objects is left out of the mean."
    from pixcon.objects import _index
    coco = _index(coco_content([(50, 50)], [thing(0, (0, 0, 20, 20))]))
    assert average_precision(coco, [])['ap'] == 0
    assert average_precision(coco, [dict(image_id=0, category_id=3, bbox=[0, 0, 20, 20], score=1.)])['classes'] == {'class 3': pytest.approx(100), 'class 7': None}
    with pytest.raises(ValueError, match='no object to find'): average_precision(_index(coco_content([(50, 50)], [])), [])


class Oracle(nn.Module):
    "Says the truth of the images it is shown, which it knows by their pixels."
    def __init__(self, data, masks=True):
        super().__init__()
        self.data, self.weight = data, nn.Parameter(torch.zeros(1))
        self.roi_heads = SimpleNamespace(box_predictor=SimpleNamespace(cls_score=nn.Linear(1, len(data.classes) + 1)), has_mask=lambda: masks)
    def forward(self, images):
        known = [self.data[i] for i in range(len(self.data))]
        truth = [next(t for x, t in known if x.shape == image.shape and torch.equal(x.float()/255, image)) for image in images]
        return [dict(boxes=t['boxes'], labels=t['labels'], scores=torch.ones(len(t['labels'])), masks=t['masks'][:, None].float()) for t in truth]


@pytest.mark.parametrize('batch', [1, 3])
def test_the_truth_scores_100(scenes, batch):
    "Through encoding, image and category ids, boxes and masks, in batches that don't divide the images."
    _, val = open_objects(scenes)
    score = evaluate(Oracle(val), val, batch)
    assert score['box_ap'] == pytest.approx(100) and score['mask_ap75'] == pytest.approx(100)
    assert all(v is None or v == pytest.approx(100) for s in score['classes'].values() for v in s.values())


def test_category_ids_with_gaps(tmp_path):
    "Ids 3 and 7, given in the wrong order, become 1 and 2 and come back as they were; image ids are not positions either."
    sizes = [(40, 50), (50, 40)]
    save_images(tmp_path, sizes)
    content = coco_content(sizes, [thing(40, (2, 3, 20, 30), 7), thing(10, (5, 5, 12, 30), 3)], (7, 3))
    for image, i in zip(content['images'], (40, 10)): image['id'] = i
    data = Objects(tmp_path, content)
    assert data.labels == {3: 1, 7: 2} and data.classes == ('class 3', 'class 7') and data.ids == [10, 40]
    assert [data[i][1]['labels'].tolist() for i in (0, 1)] == [[1], [2]] and data[1][0].shape == (3, 40, 50)
    assert evaluate(Oracle(data), data)['classes'] == {n: dict(box_ap=pytest.approx(100), mask_ap=pytest.approx(100)) for n in data.classes}


# Reading

def test_scenes_come_back(tmp_path):
    "Written and read: pixels, classes, masks; a box holds its mask exactly; objects of few pixels are crowds."
    drawn = Scenes(5, 48, seed=3)
    write_coco(drawn, tmp_path, least=30)
    data = Objects(tmp_path/'train', tmp_path/'annotations'/'instances_train.json')
    assert data.classes == scene_classes[4:] and len(data) == 5
    for i in range(5):
        image, semantic, instance = drawn.with_masks(i)
        read, target = data[i]
        assert torch.equal(read, image)
        large = [instance == k for k in instance.unique() if k and (instance == k).sum() >= 30]
        assert torch.equal(target['masks'].bool(), torch.stack(large))
        assert torch.equal(target['boxes'], masks_to_boxes(target['masks']) + torch.tensor([0, 0, 1, 1]))
        assert target['labels'].tolist() == [semantic[m][0].item() - 3 for m in large]
        assert sum(a['iscrowd'] for a in data.coco.imgToAnns[i]) == len(instance.unique()) - 1 - len(large)


def test_flips_take_boxes_and_masks_along(scenes):
    "Every item is an image of the data as it is or mirrored, and its boxes and masks with it; both kinds occur."
    data, _ = open_objects(scenes)
    draws, flipped = Draws(data, 5), []
    for p in range(12):
        image, target = draws[p]
        original = next(data[i] for i in range(len(data)) if any(torch.equal(data[i][0], x) for x in (image, image.flip(2))))
        flipped.append(not torch.equal(original[0], image))
        assert torch.equal(target['masks'], original[1]['masks'].flip(2) if flipped[-1] else original[1]['masks'])
        assert torch.equal(target['boxes'], masks_to_boxes(target['masks']) + torch.tensor([0, 0, 1, 1]))
        assert torch.equal(target['labels'], original[1]['labels'])
    assert 0 < sum(flipped) < 12
    assert all(torch.equal(a, b) for p in (9, 2) for a, b in zip(Draws(data, 5)[p][1].values(), draws[p][1].values()))
    assert not all(torch.equal(Draws(data, 6)[p][0], draws[p][0]) for p in range(6))


def test_what_is_not_learned(tmp_path):
    "Crowds and boxes without area are left out, difficult ones are not; boxes are cut at the image; images without objects stay or go."
    sizes = [(30, 40)]*3
    save_images(tmp_path, sizes)
    content = coco_content(sizes, [thing(0, (30, 20, 50, 50)), thing(0, (5, 5, 0, 9)), thing(0, (60, 0, 9, 9)), thing(0, (1, 1, 9, 9), iscrowd=1),
                                   thing(0, (2, 2, 9, 9), difficult=1), thing(1, (1, 1, 9, 9), iscrowd=1)])
    data = Objects(tmp_path, content, masks=False)
    assert data[0][1]['boxes'].tolist() == [[30, 20, 40, 30], [2, 2, 11, 11]]
    assert data.ids == [0, 1, 2] and data[2][1]['boxes'].shape == (0, 4) and 'masks' not in data[0][1]
    assert Objects(tmp_path, content, masks=False, empty=False).ids == [0]
    assert Objects(tmp_path, coco_content(sizes, []))[1][1]['masks'].shape == (0, 30, 40)


def test_grey_images_of_odd_sizes(tmp_path):
    "Are trained on and scored; what is found lies inside the image, its masks have the image's size."
    sizes = [(37, 61), (90, 31), (50, 50)]
    save_images(tmp_path, sizes, 'L')
    data = Objects(tmp_path, coco_content(sizes, [thing(0, (5, 5, 30, 20)), thing(1, (3, 40, 25, 40), 7)]))
    r = tiny(batch=3)
    model = detector(r, 2)
    assert all(np.isfinite(line['loss']) for line in fine_tune(model, data, r))
    model.roi_heads.score_thresh = 0.
    for i, (h, w) in enumerate(sizes):
        assert data.image(i).shape == (3, h, w)
        found, = predict(model, [data.image(i)])
        assert len(found['boxes']) and found['masks'].shape[1:] == (h, w) and found['masks'].dtype == torch.bool
        assert (found['boxes'] >= 0).all() and (found['boxes'] <= torch.tensor([w, h, w, h])).all()
    assert evaluate(model, data)['box_ap'] >= 0


@pytest.mark.parametrize('change,message', [
    (lambda c: c.pop('categories'), "annotations without 'categories'"),
    (lambda c: c['images'][0].pop('width'), "one of the images has no 'width'"),
    (lambda c: c['annotations'][0].pop('bbox'), "one of the annotations has no 'bbox'"),
    (lambda c: c['annotations'][0].update(image_id=9), 'has image_id 9, which is not among the images'),
    (lambda c: c['annotations'][0].update(category_id=9), 'has category_id 9, which is not among the categories'),
    (lambda c: c['annotations'][0].update(segmentation=[]), '1 objects have no mask, the first in image 0'),
])
def test_unfit_annotations_are_refused(tmp_path, change, message):
    content = coco_content([(30, 40)], [thing(0, (1, 1, 9, 9))])
    assert len(Objects(tmp_path, content)) == 1
    change(content)
    with pytest.raises(ValueError, match=message): Objects(tmp_path, content)


def test_sizes_that_disagree_are_refused(tmp_path):
    "An image of another size than its annotation says would put every box in the wrong place."
    save_images(tmp_path, [(30, 40)])
    data = Objects(tmp_path, coco_content([(40, 30)], [thing(0, (1, 1, 9, 9))]))
    with pytest.raises(ValueError, match="'0.png' has 30 x 40 pixels, its annotation says 40 x 30"): data[0]
    (tmp_path/'a.json').write_text('{"images": [')
    with pytest.raises(ValueError, match='is no JSON file'): Objects(tmp_path, tmp_path/'a.json')


def voc_image(base, name, objects):
    "One image of VOC: objects as (name, xmin, ymin, xmax, ymax, difficult)."
    for sub in ('Annotations', 'JPEGImages', 'ImageSets/Main'): (base/sub).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(base/'JPEGImages'/f'{name}.jpg')
    corners = ('xmin', 'ymin', 'xmax', 'ymax')
    found = ''.join(f"<object><name>{n}</name><difficult>{d}</difficult><bndbox>{''.join(f'<{k}>{v}</{k}>' for k, v in zip(corners, box))}</bndbox></object>" for n, *box, d in objects)
    (base/'Annotations'/f'{name}.xml').write_text(f'<annotation><size><width>40</width><height>30</height><depth>3</depth></size>{found}</annotation>')


@pytest.mark.parametrize('below', ['', 'VOCdevkit'])
def test_voc(tmp_path, below):
    "Two years to learn from and one to score; pixels count from 1; difficult objects are learned; an image without objects is not."
    root = tmp_path/below
    voc_image(root/'VOC2007', 'a', [('dog', 1, 1, 40, 30, 0), ('cat', 11, 6, 20, 15, 1)])
    voc_image(root/'VOC2007', 'b', [])
    voc_image(root/'VOC2012', 'c', [('tvmonitor', 2, 2, 3, 3, 0)])
    for year, part, names in (('2007', 'trainval', 'a\nb\n'), ('2012', 'trainval', 'c\n'), ('2007', 'test', 'b\na\n')): (root/f'VOC{year}'/'ImageSets'/'Main'/f'{part}.txt').write_text(names)
    train, test = open_objects(tmp_path)
    assert which_objects(tmp_path)[1] == 'voc' and train.classes == voc_classes and (len(train), len(test)) == (2, 2)
    assert train[0][1]['boxes'].tolist() == [[0, 0, 40, 30], [10, 5, 20, 15]] and train[0][1]['labels'].tolist() == [12, 8]
    assert train[1][1]['boxes'].tolist() == [[1, 1, 3, 3]] and train[1][1]['labels'].tolist() == [20]
    found = [dict(image_id=1, category_id=12, bbox=[0, 0, 40, 30], score=.9), dict(image_id=1, category_id=8, bbox=[10, 5, 10, 10], score=.9)]
    assert average_precision(test.coco, found)['classes']['dog'] == pytest.approx(100) and average_precision(test.coco, found)['classes']['cat'] is None
    name, r = resolve_recipe('voc')
    assert (name, r['masks']) == ('VOC', False)
    assert 'loss_mask' not in detector(tiny(masks=False), 20).train()([train[0][0].float()/255], [train[0][1]])
    with pytest.raises(ValueError, match='VOC is read without masks'): resolve_recipe('voc', masks=True)
    voc_image(root/'VOC2012', 'c', [('unicorn', 2, 2, 3, 3, 0)])
    with pytest.raises(ValueError, match="names 'unicorn', which is none of VOC's classes"): open_objects(tmp_path)


def test_folders_that_are_no_data_set(tmp_path, scenes):
    "Nothing in it, two parts of one name, no folder with the images, other classes to score than to learn."
    with pytest.raises(FileNotFoundError, match='neither a COCO folder'): open_objects(tmp_path)
    write_coco(Scenes(2, 48), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'exactly one instances_val\*.json, it has 0'): open_objects(tmp_path)
    write_coco(Scenes(2, 48), tmp_path, 'val2017')
    assert [len(part) for part in open_objects(tmp_path)] == [2, 2]
    path = tmp_path/'annotations'/'instances_val2017.json'
    content = json.loads(path.read_text())
    content['categories'][0]['name'] = 'balloon'
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='the classes to learn and to score differ'): open_objects(tmp_path)
    (tmp_path/'val2017').rename(tmp_path/'elsewhere')
    with pytest.raises(FileNotFoundError, match="has no folder 'val2017'"): open_objects(tmp_path)


# The detector

@pytest.mark.parametrize('name,stride,strides', [('resnet50', None, [4, 8, 16, 32]), ('resnet18', 16, [4, 8, 16]), ('shufflenet_v2_x1_0', 8, [4, 8]), ('mobilenet_v3_small', None, [4, 8, 16, 32])])
def test_pyramid_strides(name, stride, strides):
    "The maps have the strides that they say, the last one for proposals twice the last; a backbone is not changed by looking at it."
    backbone = make_backbone(name, stride)
    before = copy.deepcopy(backbone.state_dict())
    pyramid = Pyramid(backbone, 16).eval()
    assert pyramid.strides == strides
    assert [m.shape[1:] for m in pyramid(torch.zeros(1, 3, 128, 192)).values()] == [(16, 128//s, 192//s) for s in (*strides, 2*strides[-1])]
    assert all(torch.equal(t, pyramid.backbone.state_dict()[n]) for n, t in before.items())


def test_network_that_cannot_be_taken_apart():
    "Gives its one map."
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.side = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(3, 6, 8, 8)
        def forward(self, x): return self.down(x) + self.side(x)
    assert stage_maps(Whole()) == ({8: ('', 6)}, [''])
    assert [tuple(m.shape) for m in Pyramid(Whole(), 4)(torch.zeros(2, 3, 64, 64)).values()] == [(2, 4, 8, 8), (2, 4, 4, 4)]


@pytest.mark.parametrize('norm', ['sync', 'batch', 'frozen'])
def test_batch_norm(scenes, norm):
    "Frozen: statistics, scale and shift stay those of the backbone, none in the pyramid; otherwise both are trained, without weight decay."
    data, _ = open_objects(scenes)
    r = tiny(norm=norm)
    backbone = make_backbone('shufflenet_v2_x0_5', 8)
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.1, .1); m.running_var.uniform_(.5, 2.); nn.init.uniform_(m.weight, .5, 2.)
    backbone.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): expected = backbone(x)
    own = copy.deepcopy({n: t for n, t in backbone.state_dict().items() if 'num_batches' not in n})
    model = make_detector(backbone, 8, r)
    with torch.no_grad(): torch.testing.assert_close(model.backbone.backbone.eval()(x), expected)
    kind = dict(sync=nn.SyncBatchNorm, batch=nn.BatchNorm2d, frozen=FrozenBatchNorm2d)[norm]
    norms = [n for n, m in model.named_modules() if type(m) is kind]
    assert any('backbone.backbone' in n for n in norms) and any('fpn' in n for n in norms) == (norm != 'frozen')
    groups = _optimizer(model, r).param_groups
    of_norms = {id(p) for n in norms for p in model.get_submodule(n).parameters()}
    assert {id(p) for p in groups[1]['params']} == of_norms and groups[1]['weight_decay'] == 0 < groups[0]['weight_decay']
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))
    fine_tune(model, data, r)
    now = model.backbone.backbone.state_dict()
    of_bn = [n for n in own if any(f'backbone.backbone.{n.rpartition(".")[0]}' == m for m in norms)]
    assert of_bn and all(torch.equal(now[n], own[n]) == (norm == 'frozen') for n in of_bn)
    assert not torch.equal(now['conv1.0.weight'], own['conv1.0.weight'])


def test_statistics_anew(scenes):
    "The mean over the batches of the inputs' mean, the same whenever it is done; nothing else changes."
    data, _ = open_objects(scenes)
    r = tiny(precise_bn=3, short=96)
    model = detector(r)
    before = copy.deepcopy(model.state_dict())
    seen = []
    hook = model.backbone.backbone.get_submodule('conv1.1').register_forward_pre_hook(lambda m, x: seen.append(x[0].mean((0, 2, 3))))
    precise_bn(model, data, r)
    hook.remove()
    after = copy.deepcopy(model.state_dict())
    assert len(seen) == 3
    torch.testing.assert_close(after['backbone.backbone.conv1.1.running_mean'], torch.stack(seen).mean(0))
    assert {n for n in before if not torch.equal(before[n], after[n])} <= {n for n in before if 'running' in n or 'num_batches' in n}
    precise_bn(model, data, r)
    assert all(torch.equal(t, after[n]) for n, t in model.state_dict().items())


def test_classes_must_agree(scenes):
    "In training and in scoring."
    data, val = open_objects(scenes)
    model = detector(tiny(), 3)
    for do in (lambda: fine_tune(model, data, tiny()), lambda: evaluate(model, val)):
        with pytest.raises(ValueError, match='the detector tells 3 classes apart, the data have 8: ball, crate'): do()


def test_nothing_to_learn(scenes):
    "Images without any object train the proposals only."
    data = Objects(scenes/'train', json.loads((scenes/'annotations'/'instances_train.json').read_text()) | dict(annotations=[]))
    log = fine_tune(detector(tiny()), data, tiny())
    assert log[-1]['mask'] == log[-1]['box_reg'] == log[-1]['rpn_box_reg'] == 0 < log[-1]['objectness']


def test_half_precision(scenes):
    "bf16 trains on a CPU, too, close to float32; fp16 needs a GPU."
    data, _ = open_objects(scenes)
    full, half = (fine_tune(detector(tiny(iterations=1)), data, tiny(iterations=1), amp=amp)[0]['loss'] for amp in ('off', 'bf16'))
    assert full != half == pytest.approx(full, rel=.1)
    with pytest.raises(ValueError, match='needs a GPU'): fine_tune(detector(tiny()), data, tiny(), amp='fp16')


# Training

class Breaks:
    "Data that fail at the nth item asked for."
    def __init__(self, data, n): self.data, self.n, self.classes = data, n, data.classes
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        self.n -= 1
        if self.n < 0: raise KeyboardInterrupt
        return self.data[i]


def test_interrupted_run_ends_the_same(scenes, tmp_path):
    "Broken off in step 13, continued from the checkpoint of step 10: all weights, statistics and logged losses to the last bit."
    data, _ = open_objects(scenes)
    r = tiny(iterations=14, short=96, warmup=3)
    whole, path = detector(r), tmp_path/'checkpoint.pt'
    log = fine_tune(whole, data, r)
    with pytest.raises(KeyboardInterrupt): fine_tune(detector(r), Breaks(data, 25), r, checkpoint=path, save_minutes=0)
    assert torch.load(path, weights_only=True)['step'] == 10
    with pytest.raises(ValueError, match='seed 0, now 1'): fine_tune(detector(r), data, r, seed=1, checkpoint=path)
    torch.rand(7)                                                  # another state of the generator
    resumed = detector(r, seed=3)
    log_again = fine_tune(resumed, data, r, checkpoint=path)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())
    losses = lambda log: [{n: v for n, v in line.items() if n != 'seconds'} for line in log]
    assert losses(log_again) == losses(log) and [line['step'] for line in log] == [10, 14]
    assert log_again[-1]['seconds'] >= log_again[0]['seconds'] > 0


def test_loss_that_is_no_number_stops(scenes):
    data, _ = open_objects(scenes)
    model = detector(tiny())
    with torch.no_grad(): model.roi_heads.box_predictor.cls_score.bias.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='the loss is nan at step 0 .*try a lower lr'): fine_tune(model, data, tiny())


def test_learning_rate():
    "Field's 1x: linear warm-up over 1,000 steps, a tenth after 60,000 and 80,000; in proportion to the batch unless given."
    _, r = resolve_recipe('coco')
    assert [detect_rate(k, r) for k in (0, 500, 1000, 59_999, 60_000, 80_000)] == pytest.approx([2e-5, .02*.5005, .02, .02, .002, .0002])
    assert [resolve_recipe('coco', batch=4, **g)[1]['lr'] for g in ({}, dict(lr=.02))] == pytest.approx([.005, .02])
    assert resolve_recipe('scenes', optimizer='sgd')[1]['lr'] == pytest.approx(.01) and resolve_recipe('coco', optimizer='adamw')[1]['weight_decay'] == 1e-2


@pytest.mark.parametrize('wrong,message', [
    (dict(iteration=3), "unknown parameter 'iteration', did you mean 'iterations'"),
    (dict(checkpont='x'), "unknown parameter 'checkpont', did you mean 'checkpoint'"),
    (dict(milestones=(.5,)), "unknown parameter 'milestones'"),
    (dict(batch=0), 'batch must be at least 1, got 0'),
    (dict(lr='fast'), "lr must be a number, got 'fast'"),
    (dict(masks='perhaps'), "masks must be on or off, got 'perhaps'"),
    (dict(norm='layer'), "norm must be one of 'sync', 'batch', 'frozen', got 'layer'"),
    (dict(recipe='3x'), "recipe must be one of 'auto', '1x', '2x', 'VOC', 'small', got '3x'"),
    (dict(short=500), 'sizes must be shortest <= short <= longest, got 128, 500, 192'),
    (dict(checkpoint='x', stride=8), 'stride is that of the checkpoint'),
    (dict(amp='half'), "amp must be one of"),
])
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message): configure_detect(**wrong)


def test_how_many_images(tmp_path, scenes):
    "As the recipe says; other scenes to learn from with another seed, the same to score; more than there are is refused."
    r = configure_detect(labelled=3, test=2)[1]
    (a, va), (b, vb), (again, _) = (learn_and_score('scenes', r, s, tmp_path/f) for s, f in ((0, 'a'), (1, 'b'), (0, 'c')))
    assert (len(a), len(va)) == (3, 2) and torch.equal(a.image(0), again.image(0))
    assert not torch.equal(a.image(0), b.image(0)) and torch.equal(va.image(1), vb.image(1))
    some, val = learn_and_score(scenes, tiny(labelled=4, test=3), 0, tmp_path/'unused')
    assert len(set(some.ids)) == 4 and len(val) == 3 and not (tmp_path/'unused').exists()
    assert learn_and_score(scenes, tiny(labelled=4, test=3), 1, tmp_path)[1].ids == val.ids
    with pytest.raises(ValueError, match='labelled must be at most the number of training images with objects, 6, got 7'): learn_and_score(scenes, tiny(labelled=7), 0, tmp_path)


# The notebook

def papermill(folder, **parameters):
    "Runs the notebook in a folder; returns the finished process."
    flags = [a for n, v in parameters.items() for a in ('-p', n, str(v))]
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')}
    return subprocess.run(['papermill', ROOT/'nbs'/'finetune_detect.ipynb', 'out.ipynb', '--no-progress-bar', *flags], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_notebook_offers_every_parameter():
    "The parameters cell has the options, the switch to compare and every value of a recipe but the steps of the schedule."
    from pixcon.detect import _field, _options
    code = next(''.join(c['source']) for c in json.loads((ROOT/'nbs'/'finetune_detect.ipynb').read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))
    assert {line.split(':')[0] for line in code.splitlines()} == {*_field, *_options, 'compare'} - {'milestones'}


def test_misspelt_parameter_stops_the_notebook(tmp_path):
    stopped = papermill(tmp_path, labeled=4)
    assert stopped.returncode != 0 and "unknown parameter 'labeled', did you mean 'labelled'?" in stopped.stderr
    assert not (tmp_path/'runs').exists()


def test_notebook_compares_a_run_with_random_weights(tmp_path):
    "From a run folder; both results are written in one form, with every class; the pre-trained weights were those of the run."
    from pixcon.training import Run, configure
    run = Run(*configure(data='scenes', scenes=8, batch=4, epochs=1, hidden=16, dim=8, queue=8, out=str(tmp_path/'pre')))
    run.start(); run.save()
    done = papermill(tmp_path, checkpoint='pre', iterations=2, labelled=2, test=2, batch=2)
    assert done.returncode == 0, done.stderr[-3000:]
    folder, = (tmp_path/'runs').iterdir()
    assert folder.name == 'detect-scenes-pre-seed0'
    assert {p.name for p in folder.iterdir()} == {'data', 'checkpoint.pt', 'checkpoint-random.pt', 'items.png', 'loss.png', 'parts.png', 'detections.png', 'result.json', 'result-random.json'}
    result, random = (json.loads((folder/f'result{n}.json').read_text()) for n in ('', '-random'))
    assert list(result) == list(random) == ['task', 'data', 'checkpoint', 'variant', 'seed', 'box_ap', 'box_ap50', 'box_ap75', 'mask_ap', 'mask_ap50', 'mask_ap75', 'classes', 'seconds', 'recipe', 'settings']
    assert (result['checkpoint'], result['variant'], random['checkpoint'], random['variant']) == ('pre', 'sr', '', 'random')
    assert list(result['classes']) == list(scene_classes[4:]) and result['settings']['iterations'] == 2 and 0 <= result['box_ap'] <= 100
