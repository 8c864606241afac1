"""Objects read from COCO and VOC, and written as COCO: what comes back is what was there, and what is unfit is refused."""
import json
import math
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from made_coco import coco_content, save_images, scenes, thing  # scenes is a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from torchvision.ops import masks_to_boxes
from pixcon.objects import (Objects, _run_lengths, coco_index, encode_mask, open_objects, read_voc, show_objects,
                            voc_classes, which_objects, write_coco)
from pixcon.scenes import Scenes, scene_classes


# Run lengths and the index

@pytest.mark.parametrize('seed', range(5))
def test_masks_come_back(seed):
    "Random masks, empty and full ones, as arrays and as tensors; the string fits into JSON."
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 40, 2)
    for mask in (rng.random(shape) < rng.random(), np.zeros(shape, bool), np.ones(shape, bool)):
        for kind in (mask, mask.astype(np.uint8), torch.from_numpy(mask)):
            code = json.loads(json.dumps(encode_mask(kind)))
            assert np.array_equal(rle.decode(code), mask) and rle.area(code) == mask.sum()


def test_index_numbers_anew(tmp_path):
    "Annotations count from 1 whatever their id; what the file does not say is filled in; a file is read as its dict."
    content = coco_content([(30, 40)], [thing(0, (1, 2, 9, 8), id=0), thing(0, (5, 5, 4, 4), id=0)])
    for a in content['annotations']:
        del a['iscrowd'], a['area']
    (tmp_path/'a.json').write_text(json.dumps(content))
    for source in (content, tmp_path/'a.json', str(tmp_path/'a.json')):
        found = coco_index(source).imgToAnns[0]
        assert [(a['id'], a['iscrowd'], a['area']) for a in found] == [(1, 0, 72), (2, 0, 16)]
    assert 'iscrowd' not in content['annotations'][0]              # the caller's dict stays as it was


def test_category_ids_with_gaps(tmp_path):
    "Ids 3 and 7, given in the wrong order, become 1 and 2; image ids are not positions either."
    sizes = [(40, 50), (50, 40)]
    save_images(tmp_path, sizes)
    things = [thing(40, (2, 3, 20, 30), 7), thing(10, (5, 5, 12, 30), 3)]
    content = coco_content(sizes, things, (7, 3))
    for image, i in zip(content['images'], (40, 10)):
        image['id'] = i
    data = Objects(tmp_path, content)
    assert data.labels == {3: 1, 7: 2} and data.classes == ('class 3', 'class 7')
    assert data.ids == [10, 40]
    assert [data[i][1]['labels'].tolist() for i in (0, 1)] == [[1], [2]]
    assert data[1][0].shape == (3, 40, 50)


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
        masks = [instance == k for k in instance.unique() if k]
        large = [m for m in masks if m.sum() >= 30]
        assert torch.equal(target['masks'].bool(), torch.stack(large))
        exact = masks_to_boxes(target['masks']) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(target['boxes'], exact)
        assert target['labels'].tolist() == [semantic[m][0].item() - 3 for m in large]
        crowds = sum(a['iscrowd'] for a in data.coco.imgToAnns[i])
        assert crowds == len(masks) - len(large)


def test_what_is_not_learned(tmp_path):
    """Crowds and boxes without area are left out, difficult ones are not; boxes are cut at the image;
    images without objects stay or go."""
    sizes = [(30, 40)]*3
    save_images(tmp_path, sizes)
    content = coco_content(sizes, [
        thing(0, (30, 20, 50, 50)),
        thing(0, (5, 5, 0, 9)),
        thing(0, (60, 0, 9, 9)),
        thing(0, (1, 1, 9, 9), iscrowd=1),
        thing(0, (2, 2, 9, 9), difficult=1),
        thing(1, (1, 1, 9, 9), iscrowd=1)])
    data = Objects(tmp_path, content, masks=False)
    assert data[0][1]['boxes'].tolist() == [[30, 20, 40, 30], [2, 2, 11, 11]]
    assert data.ids == [0, 1, 2] and data[2][1]['boxes'].shape == (0, 4)
    assert 'masks' not in data[0][1]
    assert Objects(tmp_path, content, masks=False, empty=False).ids == [0]
    assert Objects(tmp_path, coco_content(sizes, []))[1][1]['masks'].shape == (0, 30, 40)


def test_grey_images_of_odd_sizes(tmp_path):
    "Have three channels and their own size, as have their masks."
    sizes = [(37, 61), (90, 31), (50, 50)]
    save_images(tmp_path, sizes, 'L')
    things = [thing(0, (5, 5, 30, 20)), thing(1, (3, 40, 25, 40), 7)]
    data = Objects(tmp_path, coco_content(sizes, things))
    for i, (h, w) in enumerate(sizes):
        image, target = data[i]
        assert image.shape == data.image(i).shape == (3, h, w)
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        assert target['masks'].shape == (len(target['boxes']), h, w)


def test_some_of_the_images(scenes):
    "n of them, each once, in order; the same for the same seed; 0 takes all; the data stay as they were."
    data, _ = open_objects(scenes)
    taken = [data.take(3, seed).ids for seed in range(8)]
    assert all(len(ids) == 3 and ids == sorted(set(ids)) for ids in taken)
    assert taken == [data.take(3, seed).ids for seed in range(8)]
    assert len({tuple(ids) for ids in taken}) > 1
    assert data.take(0).ids == data.ids == list(range(6))
    some = data.take(2, 1)
    assert torch.equal(some.image(1), data.image(some.ids[1]))


@pytest.mark.parametrize('change,message', [
    (lambda c: c.pop('categories'), "annotations without 'categories'"),
    (lambda c: c['images'][0].pop('width'), "one of the images has no 'width'"),
    (lambda c: c['annotations'][0].pop('bbox'), "one of the annotations has no 'bbox'"),
    (lambda c: c['annotations'][0].update(image_id=9),
     'has image_id 9, which is not among the images'),
    (lambda c: c['annotations'][0].update(category_id=9),
     'has category_id 9, which is not among the categories'),
    (lambda c: c['annotations'][0].update(segmentation=[]),
     '1 objects have no mask, the first in image 0'),
])
def test_unfit_annotations_are_refused(tmp_path, change, message):
    content = coco_content([(30, 40)], [thing(0, (1, 1, 9, 9))])
    assert len(Objects(tmp_path, content)) == 1
    change(content)
    with pytest.raises(ValueError, match=message):
        Objects(tmp_path, content)


@pytest.mark.parametrize('change,message', [
    (dict(bbox=[1, 1, math.nan, 2]), 'its bbox must be four finite numbers'),
    (dict(bbox='1 1 2 2'), 'its bbox must be four finite numbers'),
    (dict(bbox=[1, 1, 2]), 'its bbox must be four finite numbers'),
    (dict(area='large'), 'its iscrowd and area must be numbers'),
    (dict(segmentation=[[1, 1, math.inf, 2, 3, 3]]), 'its segmentation must be polygons of finite numbers'),
    (dict(segmentation=[[1, 2, 3, 4]]), 'each of three corners or more'),
    (dict(segmentation=[[[1, 2, 3, 4, 5, 6]]]), 'its segmentation must be polygons'),
    (dict(segmentation=7), 'must be polygons or run lengths, got 7'),
    (dict(segmentation=dict(size=[10**6, 10**6], counts='0')), r'has size \[1000000, 1000000\], its image \[30, 40\]'),
    (dict(segmentation=dict(size=[30, 40], counts='5')), 'fills 5 pixels, its image has 1200'),
    (dict(segmentation=dict(size=[30, 40], counts=[-1, 1201])), 'must have whole run lengths'),
    (dict(segmentation=dict(size=[30, 40], counts='~')), 'is no text of run lengths'),
    (dict(segmentation=dict(size=[30, 40], counts='h')), 'ends within a number'),
    (dict(segmentation=dict(size=[30, 40])), 'must have whole run lengths')])
def test_numbers_that_pycocotools_would_trust(tmp_path, change, message):
    "The sentence names the annotation and its image."
    content = coco_content([(30, 40)], [thing(0, (1, 1, 9, 9)) | dict(id=5) | change])
    with pytest.raises(ValueError, match=f'annotation 5 of image 0: .*{message}'): Objects(tmp_path, content)


def test_polygons_stay_in_the_image(tmp_path):
    "A corner far away is moved to the border, one inside stays."
    far = thing(0, (1, 1, 9, 9)) | dict(segmentation=[[3.5, 2, 1e9, 2, 1e9, 1e9, -1e9, 25]])
    data = Objects(tmp_path, coco_content([(30, 40)], [far]))
    assert data.coco.anns[1]['segmentation'] == [[3.5, 2, 40, 2, 40, 30, 0, 25]]
    assert data.coco.annToMask(data.coco.anns[1]).shape == (30, 40)


@pytest.mark.parametrize('change,message', [
    (dict(height=0), r'has height and width \(0, 40\)'), (dict(width=10**9), 'in pixels from 1 to 32767'),
    (dict(height='30'), 'has height and width'), (dict(id=[1]), r'one of the images has id \[1\], it must be a number'),
    (dict(file_name='../0.png'), 'image 0 lies outside of the image folder'),
    (dict(file_name='/etc/passwd'), 'image 0 lies outside of the image folder')])
def test_images_that_can_not_be(tmp_path, change, message):
    content = coco_content([(30, 40)], [thing(0, (1, 1, 9, 9))])
    content['images'][0].update(change)
    with pytest.raises(ValueError, match=message): Objects(tmp_path, content)


def test_endless_nesting_is_no_json(tmp_path):
    (tmp_path/'a.json').write_text('['*10**6)
    with pytest.raises(ValueError, match='is no JSON file'): Objects(tmp_path, tmp_path/'a.json')


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([0., .01, .5, 1.]))
@settings(max_examples=200, deadline=None)
def test_run_lengths_are_read_as_written(h, w, seed, filled):
    "Of masks of any size, also with runs longer than one character holds."
    mask = np.random.default_rng(seed).random((h, w)) < filled
    flat = mask.T.flatten()
    ends = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    runs = ([0] if flat[0] else []) + np.diff(ends).tolist()
    assert _run_lengths(encode_mask(mask)['counts']) == runs


def test_sizes_that_disagree_are_refused(tmp_path):
    "An image of another size than its annotation says would put every box in the wrong place."
    save_images(tmp_path, [(30, 40)])
    data = Objects(tmp_path, coco_content([(40, 30)], [thing(0, (1, 1, 9, 9))]))
    message = "'0.png' has 30 x 40 pixels, its annotation says 40 x 30"
    with pytest.raises(ValueError, match=message):
        data[0]
    (tmp_path/'a.json').write_text('{"images": [')
    with pytest.raises(ValueError, match='is no JSON file'):
        Objects(tmp_path, tmp_path/'a.json')


# VOC

def voc_image(base, name, objects):
    "One image of VOC: objects as (name, xmin, ymin, xmax, ymax, difficult)."
    for sub in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (base/sub).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(base/'JPEGImages'/f'{name}.jpg')
    text = '<annotation><size><width>40</width><height>30</height><depth>3</depth></size>'
    for n, *box, d in objects:
        sides = zip(('xmin', 'ymin', 'xmax', 'ymax'), box)
        corners = ''.join(f'<{k}>{v}</{k}>' for k, v in sides)
        text += f'<object><name>{n}</name><difficult>{d}</difficult>'
        text += f'<bndbox>{corners}</bndbox></object>'
    (base/'Annotations'/f'{name}.xml').write_text(text + '</annotation>')


def voc_list(base, part, names):
    (base/'ImageSets'/'Main'/f'{part}.txt').write_text('\n'.join(names) + '\n')


@pytest.mark.parametrize('below', ['', 'VOCdevkit'])
def test_voc(tmp_path, below):
    """Two years to learn from and one to score; pixels count from 1; difficult objects are learned;
    an image without objects is not."""
    root = tmp_path/below
    voc_image(root/'VOC2007', 'a', [('dog', 1, 1, 40, 30, 0), ('cat', 11, 6, 20, 15, 1)])
    voc_image(root/'VOC2007', 'b', [])
    voc_image(root/'VOC2012', 'c', [('tvmonitor', 2, 2, 3, 3, 0)])
    voc_list(root/'VOC2007', 'trainval', 'ab')
    voc_list(root/'VOC2012', 'trainval', 'c')
    voc_list(root/'VOC2007', 'test', 'ba')
    train, test = open_objects(tmp_path)
    assert which_objects(tmp_path) == (root, 'voc')
    assert train.classes == voc_classes and (len(train), len(test)) == (2, 2)
    assert train[0][1]['boxes'].tolist() == [[0, 0, 40, 30], [10, 5, 20, 15]]
    assert train[0][1]['labels'].tolist() == [12, 8]
    assert train[1][1]['boxes'].tolist() == [[1, 1, 3, 3]]
    assert train[1][1]['labels'].tolist() == [20]
    found = test.coco.imgToAnns[1]
    assert [(a['category_id'], a['difficult'], a['area']) for a in found] == [(12, 0, 1200), (8, 1, 100)]
    voc_image(root/'VOC2012', 'c', [('unicorn', 2, 2, 3, 3, 0)])
    with pytest.raises(ValueError, match="names 'unicorn', which is none of VOC's classes"):
        open_objects(tmp_path)


def test_voc_has_no_masks(tmp_path):
    "Asking for them is an error, not a silence."
    voc_image(tmp_path/'VOC2007', 'a', [('dog', 1, 1, 40, 30, 0)])
    voc_list(tmp_path/'VOC2007', 'test', 'a')
    with pytest.raises(ValueError, match='read boxes only'):
        Objects(tmp_path, read_voc(tmp_path, [('2007', 'test')]))


# Folders and pictures

def test_folders_that_are_no_data_set(tmp_path):
    "Nothing in it, two parts of one name, no folder with the images, other classes to score than to learn."
    with pytest.raises(FileNotFoundError, match='neither a COCO folder'):
        open_objects(tmp_path)
    write_coco(Scenes(2, 48), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'exactly one instances_val\*.json, it has 0'):
        open_objects(tmp_path)
    write_coco(Scenes(2, 48), tmp_path, 'val2017')
    assert [len(part) for part in open_objects(tmp_path)] == [2, 2]
    path = tmp_path/'annotations'/'instances_val2017.json'
    content = json.loads(path.read_text())
    content['categories'][0]['name'] = 'balloon'
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='the classes to learn and to score differ'):
        open_objects(tmp_path)
    (tmp_path/'val2017').rename(tmp_path/'elsewhere')
    with pytest.raises(FileNotFoundError, match="has no folder 'val2017'"):
        open_objects(tmp_path)
    write_coco(Scenes(2, 48), tmp_path, 'value')
    with pytest.raises(FileNotFoundError, match='it has 2: val2017, value'):
        open_objects(tmp_path)


def test_images_in_a_folder_below(tmp_path):
    "COCO's own zip files unpack to train2017, many keep them in images/train2017: both are found."
    for part in ('train2017', 'val2017'):
        write_coco(Scenes(2, 48), tmp_path, part)
    (tmp_path/'images').mkdir()
    (tmp_path/'train2017').rename(tmp_path/'images'/'train2017')
    train, test = open_objects(tmp_path)
    assert torch.equal(train.image(0), test.image(0))


def test_drawing(scenes):
    "One rectangle for each box; of detections only those that score enough, with the score written."
    data, _ = open_objects(scenes)
    image, target = data[0]
    ax = show_objects(image, target, data.classes)
    assert len(ax.patches) == len(ax.texts) == len(target['boxes'])
    scores = torch.linspace(0, 1, len(target['boxes']))
    ax = show_objects(image, target | dict(scores=scores), data.classes, least=.5)
    assert len(ax.patches) == (scores >= .5).sum() and ax.texts[-1].get_text().endswith(' 1.00')
    nothing = {n: v[:0] for n, v in target.items()}
    assert not show_objects(image, nothing, data.classes).patches
    plt.close('all')
