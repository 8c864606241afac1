"""Scores against counting by hand, readers of labelled data against files written here, retrieval against a slow search."""
import math
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index
from pixcon.labelled import LabelledImages, open_labelled
from pixcon.probe import cell_classes, cell_features, feature_health, knn_score, linear_probe, nearest_cells, resized, scores

moderate = settings(max_examples=60, deadline=None, derandomize=True)


def confusion(prediction, truth, classes): return multiclass_confusion_matrix(prediction, truth, classes, ignore_index=255)


def save(path, array, mode=None):
    "Writes an array as an image file, with a palette if mode is P."
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(array, dtype=np.uint16 if mode == 'I;16' else np.uint8))
    if mode == 'P':
        picture = picture.convert('P')
        picture.putpalette([(i*37 + c*91) % 256 for i in range(256) for c in range(3)])
    picture.save(path)


def noise(height, width, seed=0, channels=3):
    "A random image (H,W,3)."
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


# Scores

@moderate
@given(st.lists(st.tuples(st.sampled_from((0, 1, 2, 3, 255)), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_are_counted(pixels):
    "Each class's IoU, the mean over classes that occur, and accuracy, pixel by pixel; five classes, of which one never occurs."
    truth, prediction = (torch.tensor(v) for v in zip(*pixels))
    labelled = [(t, g) for t, g in pixels if t != 255]
    ours = scores(confusion(prediction, truth, 5))
    expected = []
    for c in range(5):
        both, either = sum(t == g == c for t, g in labelled), sum(c in (t, g) for t, g in labelled)
        expected.append(100*both/either if either else math.nan)
    np.testing.assert_allclose(ours['iou'], expected)
    if labelled:
        assert ours['miou'] == pytest.approx(np.nanmean(expected))
        assert ours['accuracy'] == pytest.approx(100*sum(t == g for t, g in labelled)/len(labelled))
        assert ours['miou'] == pytest.approx(100*multiclass_jaccard_index(prediction, truth, 5, ignore_index=255).item(), abs=1e-3)


# Readers

def test_pairs_of_odd_sizes_and_grey_images(tmp_path):
    "Matched by name in subfolders; grey images become RGB; palette, grey and 16 bit labels are read as numbers."
    for name, mode, shape in (('a', 'P', (5, 9)), ('sub/b', None, (7, 3)), ('c', 'I;16', (1, 11))):
        save(tmp_path/'images'/'train'/f'{name}.png', noise(*shape)[..., 0] if name == 'c' else noise(*shape))
        save(tmp_path/'labels'/'train'/f'{name}.png', np.arange(shape[0]*shape[1]).reshape(shape) % 4, mode)
    save(tmp_path/'images'/'train'/'unlabelled.png', noise(4, 4))
    data = open_labelled(str(tmp_path))
    assert (len(data), data.classes, data.unlabelled, data.kind) == (3, 4, 1, 'pairs')
    assert [tuple(x.shape) for x, _ in data] == [(3, 5, 9), (3, 1, 11), (3, 7, 3)]
    for image, label in data:
        assert image.dtype == torch.uint8 and label.dtype == torch.int64
        assert torch.equal(label.flatten(), torch.arange(label.numel()) % 4)


def test_camvid_codes(tmp_path):
    "The SegNet layout; 11 is no class, by prefix or by `ignore`; without either it is a class of its own."
    save(tmp_path/'val'/'x.png', noise(4, 3)); save(tmp_path/'valannot'/'x.png', np.arange(12).reshape(4, 3))
    expected = torch.tensor([*range(11), 255]).view(4, 3)
    named = open_labelled(f'camvid:{tmp_path}', 'val')
    assert torch.equal(named[0][1], expected) and named.names[8] == 'car' and named.classes == 11
    assert torch.equal(open_labelled(str(tmp_path), 'val', ignore=11)[0][1], expected)
    assert open_labelled(str(tmp_path), 'val').classes == 12


@pytest.mark.parametrize('lists', [dict(train='p', train_aug='p q'), dict(train='p', trainaug='/JPEGImages/p.jpg@/SegmentationClassAug/p.png q'), dict(train='p', aug='q')])
@pytest.mark.parametrize('below', ['', 'VOC2012', 'VOCdevkit/VOC2012'])
def test_voc(tmp_path, lists, below):
    "Palette PNGs with 255 as border, split lists in three spellings, labels of SBD beside VOC's own."
    root = tmp_path/below
    for stem, folder, code in (('p', 'SegmentationClass', 20), ('q', 'SegmentationClassAug', 15)):
        save(root/'JPEGImages'/f'{stem}.jpg', noise(6, 8))
        save(root/folder/f'{stem}.png', [[0]*4 + [code]*3 + [255]]*6, 'P')
    (root/'ImageSets'/'Segmentation').mkdir(parents=True)
    for name, stems in lists.items(): (root/'ImageSets'/'Segmentation'/f'{name}.txt').write_text('\n'.join(s.replace('@', ' ') for s in stems.split()) + '\n')
    aug = open_labelled(str(tmp_path), 'train_aug')
    assert len(open_labelled(str(tmp_path))) == 1 and len(aug) == 2 and aug.kind == 'voc' and aug.names[15] == 'person'
    assert [sorted(label.unique().tolist()) for _, label in aug] == [[0, 20, 255], [0, 15, 255]]
    with pytest.raises(ValueError, match="no split 'test'"): open_labelled(str(tmp_path), 'test')


def test_ade20k_and_cocostuff_numbers(tmp_path):
    "ADE20K shifts by one and ignores 0; COCO-Stuff closes the gaps, and its unused numbers are refused."
    for part in ('training', 'validation'):
        save(tmp_path/'ade'/'images'/part/'a.jpg', noise(3, 51)); save(tmp_path/'ade'/'annotations'/part/'a.png', np.r_[np.arange(151), 0, 0].reshape(3, 51))
    label = open_labelled(str(tmp_path/'ade'), 'val')[0][1].flatten()
    assert label.tolist() == [255, *range(150), 255, 255]
    unused = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    used = [k for k in range(182) if k not in unused]
    save(tmp_path/'coco'/'images'/'train2017'/'a.jpg', noise(2, 86)); save(tmp_path/'coco'/'stuffthingmaps'/'train2017'/'a.png', np.array([*used, 255]).reshape(2, 86))
    (tmp_path/'coco'/'annotations').mkdir()
    coco = open_labelled(str(tmp_path/'coco'))
    assert coco.kind == 'cocostuff' and coco[0][1].flatten().tolist() == [*range(171), 255]
    save(tmp_path/'coco'/'stuffthingmaps'/'train2017'/'a.png', np.full((2, 86), 11))
    with pytest.raises(ValueError, match='holds 11, which is none'): coco[0]


def test_cityscapes_ids(tmp_path):
    "The 34 ids give exactly the 19 classes in order, all else is ignored; files are sorted."
    for city in ('zurich', 'aachen'):
        save(tmp_path/'leftImg8bit'/'train'/city/f'{city}_0_0_leftImg8bit.png', noise(2, 17))
        save(tmp_path/'gtFine'/'train'/city/f'{city}_0_0_gtFine_labelIds.png', np.arange(34).reshape(2, 17))
    data = open_labelled(str(tmp_path))
    label = data[0][1].flatten()
    assert 'aachen' in str(data.pairs[0][0]) and len(data) == 2 and data.kind == 'cityscapes'
    assert label[label != 255].tolist() == list(range(19)) and (data.names[0], data.names[13], data.names[18]) == ('road', 'car', 'bicycle')
    assert [i for i, c in enumerate(label.tolist()) if c != 255] == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


@pytest.mark.parametrize('wrong,message', [
    (lambda d: save(d/'train'/'labels'/'a.png', noise(4, 5)), 'colour picture'),
    (lambda d: save(d/'train'/'labels'/'a.png', np.zeros((4, 6))), r'different sizes .height, width.: \(4, 5\) in .*\(4, 6\) in'),
    (lambda d: save(d/'train'/'labels'/'a.png', np.full((4, 5), 3)), 'holds 3, which is none of the 3 classes'),
    (lambda d: save(d/'train'/'labels'/'a.png', np.full((4, 5), 300), 'I;16'), 'holds 300'),
    (lambda d: (d/'train'/'labels'/'a.png').write_bytes(b'nothing'), 'cannot read label'),
    (lambda d: save(d/'train'/'labels'/'z.png', np.zeros((4, 5))), 'labels have no image'),
])
def test_unfit_labels_are_refused(tmp_path, wrong, message):
    "With the file's name and what is the matter."
    save(tmp_path/'train'/'images'/'a.png', noise(4, 5)); save(tmp_path/'train'/'labels'/'a.png', np.zeros((4, 5)))
    open_labelled(str(tmp_path), classes=3)[0]
    wrong(tmp_path)
    with pytest.raises(ValueError, match=message): open_labelled(str(tmp_path), classes=3)[0]


def test_unknown_folders_are_refused(tmp_path):
    "A folder that is not there, one without a data set, one that is not what the prefix says."
    with pytest.raises(FileNotFoundError, match='is no folder'): open_labelled('/no/such/folder')
    with pytest.raises(FileNotFoundError, match='has no split'): open_labelled(str(tmp_path))
    for kind in ('voc', 'cityscapes', 'ade20k'):
        with pytest.raises(FileNotFoundError, match='has no'): open_labelled(f'{kind}:{tmp_path}')


# Features and the probe

@moderate
@given(h=st.integers(2, 40), w=st.integers(2, 40), size=st.tuples(st.integers(2, 60), st.integers(2, 60)))
def test_resizing_keeps_to_the_nearest_pixel(h, w, size):
    "Each new label is the one under the centre of its pixel, up to exact ties; no class is invented."
    label = torch.randint(0, 255, (h, w), generator=torch.Generator().manual_seed(h*41 + w))
    new = resized(torch.zeros(3, h, w, dtype=torch.uint8), label, size)[1]
    y, x = ((np.arange(n) + .5)*m/n for n, m in zip(size, (h, w)))
    for j in range(size[0]):
        rows = {min(h-1, max(0, math.floor(y[j] + e))) for e in (-1e-4, 1e-4)}
        for i in range(size[1]):
            columns = {min(w-1, max(0, math.floor(x[i] + e))) for e in (-1e-4, 1e-4)}
            assert new[j, i].item() in {label[r, c].item() for r in rows for c in columns}


def tiny(): return nn.Conv2d(3, 6, 4, 4)


@pytest.mark.parametrize('ram,dtype', [(4e9, torch.float32), (6*30*2*11 + 1, torch.float16), (0, torch.float16)])
def test_features_in_any_storage(ram, dtype):
    "In batches that don't divide the number of images, non-square, in memory or in a file."
    torch.manual_seed(0)
    net, images = tiny(), list(torch.randint(0, 256, (11, 3, 20, 24), dtype=torch.uint8))
    f = cell_features(net, images, batch=4, ram=ram)
    assert f.shape == (11, 6, 5, 6) and f.dtype == dtype
    torch.testing.assert_close(f.float(), cell_features(net, images), atol=2e-3, rtol=2e-3)


def test_probe_streams_what_tensors_hold(tmp_path):
    "Files give the same result as tensors; float16 storage nearly the same."
    torch.manual_seed(0)
    net, images = tiny(), torch.randint(0, 256, (6, 3, 16, 24), dtype=torch.uint8)
    labels = (F.avg_pool2d(images.float().mean(1), 4) > 127).long().repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, 0] = 255
    for i in range(6): save(tmp_path/'train'/'images'/f'{i}.png', images[i].permute(1, 2, 0)); save(tmp_path/'train'/'labels'/f'{i}.png', labels[i], 'P')
    files = open_labelled(str(tmp_path))
    a, b = linear_probe(net, (images, labels), (images, labels), 2), linear_probe(net, files, files, 2)
    assert torch.equal(a.pop('prediction'), b.pop('prediction')) and a == b and a['accuracy'] > 60
    assert linear_probe(net, files, files, 2, ram=0)['miou'] == pytest.approx(a['miou'], abs=1)


def test_probe_refuses(tmp_path):
    "No label at all, a label beyond the classes, images of different sizes."
    images, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match='all are 255'): linear_probe(tiny(), (images, labels + 255), (images, labels), 2)
    with pytest.raises(ValueError, match='labels go up to 2, but there are 2 classes'): linear_probe(tiny(), (images, labels), (images, labels + 2), 2)
    mixed = [(images[0], labels[0]), (images[0, :, :4], labels[0, :4])]
    with pytest.raises(ValueError, match='give one size'): linear_probe(tiny(), mixed, mixed, 2)
    assert linear_probe(tiny(), mixed, mixed, 2, epochs=1, size=(8, 12))['prediction'].shape == (2, 8, 12)


# Retrieval and health

@moderate
@given(n=st.integers(2, 4), h=st.integers(1, 3), w=st.integers(1, 4), seed=st.integers(0, 99), once=st.booleans())
def test_nearest_cells_are_the_nearest(n, h, w, seed, once):
    "A slow search over all cells of other images."
    f = torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))
    query = torch.tensor([[seed % n, seed % h, seed % w]])
    k = n - 1 if once else min(3, (n-1)*h*w)
    where, cosine = nearest_cells(f, query, k, once=once)
    q = f[query[0, 0], :, query[0, 1], query[0, 2]]
    slow = {(i, y, x): F.cosine_similarity(q, f[i, :, y, x], dim=0).item() for i in range(n) if i != query[0, 0] for y in range(h) for x in range(w)}
    best = sorted((max(s for c, s in slow.items() if c[0] == i) for i in {c[0] for c in slow}) if once else slow.values(), reverse=True)[:k]
    np.testing.assert_allclose(cosine[0], best, atol=1e-5)
    np.testing.assert_allclose([slow[tuple(c)] for c in where[0].tolist()], best, atol=1e-5)
    assert not once or len(set(where[0, :, 0].tolist())) == k


def test_knn_score_by_hand():
    "Three images of two cells. Each cell's nearest in other images: right for three of five labelled cells; the sixth has no label."
    f = torch.tensor([[[1., 0], [0, 1]], [[.9, .1], [.2, 1]], [[1, .2], [1, .3]]]).permute(0, 2, 1)[:, :, None]  # (3,2,1,2)
    labels = torch.tensor([[[0, 1]], [[0, 1]], [[1, 255]]])        # (3,1,2)
    ours = knn_score(f, labels, k=1)
    assert ours['knn'] == pytest.approx(60) and ours['chance'] == pytest.approx(100*(4 + 9)/25)
    with pytest.raises(ValueError, match='no cell has a labelled pixel'): knn_score(f, labels*0 + 255)


def test_cell_classes_by_vote():
    "Most frequent labelled pixel of a cell, also where cells don't divide the image."
    label = torch.tensor([[0, 0, 2, 255, 255], [1, 0, 2, 255, 255], [3, 3, 1, 1, 255]])
    assert cell_classes(label[None], (1, 1)).item() == 0
    assert cell_classes(label[None, :2], (1, 5)).tolist()[0][0][1:] == [0, 2, 255, 255]


def test_health_of_known_features():
    "Two opposite vectors; one vector; orthonormal vectors."
    two = torch.tensor([[1., 0], [-1, 0]]).repeat(50, 1)
    pairs = [math.exp(-8)]*(50*50) + [1.]*(2*50*49//2)
    assert feature_health(two)['uniformity'] == pytest.approx(math.log(sum(pairs)/len(pairs)), abs=1e-4)
    assert feature_health(two)['rank'] == pytest.approx(1)
    same = feature_health(torch.ones(20, 8, 2, 2))
    assert same['spread'] == pytest.approx(0, abs=1e-6) and same['uniformity'] == pytest.approx(0, abs=1e-6)
    basis = feature_health(torch.eye(16)*torch.arange(1, 17)[:, None])
    assert basis['uniformity'] == pytest.approx(-4, abs=1e-4) and basis['rank'] == pytest.approx(15, abs=1e-3)
