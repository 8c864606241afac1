"""Scores against counting by hand, retrieval against a slow search, results in one table."""
import json
import math
import os
import subprocess
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.functional.classification import multiclass_jaccard_index
from pixcon.labelled import open_labelled
from pixcon.probe import cell_classes, cell_features, feature_health, kmeans_score, knn_segment
from pixcon.probe import labelled_features, linear_probe, logistic_probe, nearest_cells
from pixcon.probe import probe_result, read_results, resized, results_table, retrieval_precision
from pixcon.probe import score_line, scores, soft_labels

ROOT = Path(__file__).parent.parent
moderate = settings(max_examples=60, deadline=None, derandomize=True)


def tiny(): return nn.Conv2d(3, 6, 4, 4)


# Scores

pixel = st.tuples(st.sampled_from((0, 1, 2, 3, 255)), st.integers(0, 3))


@moderate
@given(st.lists(pixel, min_size=1, max_size=40))
def test_scores_are_counted(pixels):
    "Each class's IoU, the mean over classes that occur, accuracy; one of five never occurs."
    label, prediction = (torch.tensor(v) for v in zip(*pixels))
    labelled = [(t, g) for t, g in pixels if t != 255]
    ours = scores(multiclass_confusion_matrix(prediction, label, 5, ignore_index=255))
    expected = []
    for c in range(5):
        both = sum(t == g == c for t, g in labelled)
        either = sum(c in (t, g) for t, g in labelled)
        expected.append(100*both/either if either else math.nan)
    np.testing.assert_allclose(ours['iou'], expected)
    if labelled:
        right = sum(t == g for t, g in labelled)
        jaccard = multiclass_jaccard_index(prediction, label, 5, ignore_index=255)
        assert ours['miou'] == pytest.approx(np.nanmean(expected))
        assert ours['accuracy'] == pytest.approx(100*right/len(labelled))
        assert ours['miou'] == pytest.approx(100*jaccard.item(), abs=1e-3)


# Features and the probe

@moderate
@given(h=st.integers(2, 40), w=st.integers(2, 40),
       size=st.tuples(st.integers(2, 60), st.integers(2, 60)))
def test_resizing_keeps_to_the_nearest_pixel(h, w, size):
    "Each new label is the one under the centre of its pixel, up to exact ties."
    label = torch.randint(0, 255, (h, w), generator=torch.Generator().manual_seed(h*41 + w))
    new = resized(torch.zeros(3, h, w, dtype=torch.uint8), label, size)[1]
    y, x = ((np.arange(n) + .5)*m/n for n, m in zip(size, (h, w)))
    for j in range(size[0]):
        rows = {min(h-1, max(0, math.floor(y[j] + e))) for e in (-1e-4, 1e-4)}
        for i in range(size[1]):
            columns = {min(w-1, max(0, math.floor(x[i] + e))) for e in (-1e-4, 1e-4)}
            assert new[j, i].item() in {label[r, c].item() for r in rows for c in columns}


@pytest.mark.parametrize('ram,dtype', [
    (4e9, torch.float32),
    (6*30*2*11 + 1, torch.float16),
    (0, torch.float16),
])
def test_features_in_any_storage(ram, dtype):
    "In batches that don't divide the number of images, non-square, in memory or in a file."
    torch.manual_seed(0)
    net, images = tiny(), list(torch.randint(0, 256, (11, 3, 20, 24), dtype=torch.uint8))
    f = cell_features(net, images, batch=4, ram=ram)
    assert f.shape == (11, 6, 5, 6) and f.dtype == dtype
    torch.testing.assert_close(f.float(), cell_features(net, images), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize('training', [True, False])
def test_mode_is_kept(training):
    "The backbone is in eval mode while it is used, and afterwards as it was, also after an error."
    net, modes = nn.Sequential(tiny()).train(training), []
    net.register_forward_hook(lambda module, x, y: modes.append(module.training))
    images = list(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert not cell_features(net, images).requires_grad and net.training == training
    with pytest.raises(ValueError, match='give one size'):
        cell_features(net, [*images, images[0][:, :4]], batch=2, n=3)
        cell_features(net, [images[0], images[0][:, :4]], batch=1)
    assert net.training == training and not any(modes)


def test_probe_streams_what_tensors_hold(tmp_path):
    "Files give the same result as tensors; float16 storage nearly the same."
    torch.manual_seed(0)
    net, images = tiny(), torch.randint(0, 256, (6, 3, 16, 24), dtype=torch.uint8)
    bright = F.avg_pool2d(images.float().mean(1), 4) > 127
    labels = bright.long().repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, 0] = 255
    for part in ('images', 'labels'):
        (tmp_path/'train'/part).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images.permute(0, 2, 3, 1), labels)):
        Image.fromarray(image.numpy()).save(tmp_path/'train'/'images'/f'{i}.png')
        Image.fromarray(label.byte().numpy()).save(tmp_path/'train'/'labels'/f'{i}.png')
    files = open_labelled(str(tmp_path))
    a = linear_probe(net, (images, labels), (images, labels), 2)
    b = linear_probe(net, files, files, 2)
    assert torch.equal(a.pop('prediction'), b.pop('prediction')) and a == b and a['accuracy'] > 60
    assert linear_probe(net, files, files, 2, ram=0)['miou'] == pytest.approx(a['miou'], abs=1)


def test_probe_refuses():
    "No label at all, a label beyond the classes, images of different sizes."
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match='all are 255'):
        linear_probe(tiny(), (images, labels + 255), (images, labels), 2)
    with pytest.raises(ValueError, match='labels go up to 2, but there are 2 classes'):
        linear_probe(tiny(), (images, labels), (images, labels + 2), 2)
    mixed = [(images[0], labels[0]), (images[0, :, :4], labels[0, :4])]
    with pytest.raises(ValueError, match='give one size'):
        linear_probe(tiny(), mixed, mixed, 2)
    result = linear_probe(tiny(), mixed, mixed, 2, epochs=1, size=(8, 12))
    assert result['prediction'].shape == (2, 8, 12)


# Retrieval

@moderate
@given(n=st.integers(2, 4), h=st.integers(1, 3), w=st.integers(1, 4),
       seed=st.integers(0, 99), once=st.booleans())
def test_nearest_cells_are_the_nearest(n, h, w, seed, once):
    "A slow search over all cells of other images."
    f = torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))
    query = torch.tensor([[seed % n, seed % h, seed % w]])
    k = n - 1 if once else min(3, (n-1)*h*w)
    where, cosine = nearest_cells(f, query, k, once=once)
    own = query[0, 0].item()
    q = f[own, :, query[0, 1], query[0, 2]]
    cells = [(i, y, x) for i in range(n) if i != own for y in range(h) for x in range(w)]
    slow = {(i, y, x): F.cosine_similarity(q, f[i, :, y, x], dim=0).item() for i, y, x in cells}
    values = slow.values()
    if once:
        values = [max(s for c, s in slow.items() if c[0] == i) for i in range(n) if i != own]
    best = sorted(values, reverse=True)[:k]
    np.testing.assert_allclose(cosine[0], best, atol=1e-5)
    np.testing.assert_allclose([slow[tuple(c)] for c in where[0].tolist()], best, atol=1e-5)
    assert not once or len(set(where[0, :, 0].tolist())) == k


def test_retrieval_precision_by_hand():
    "Three images of two cells: right for three of five labelled cells; the sixth has no label."
    f = torch.tensor([[[1., 0], [0, 1]], [[.9, .1], [.2, 1]], [[1, .2], [1, .3]]])
    f = f.permute(0, 2, 1)[:, :, None]                             # (3,2,1,2)
    labels = torch.tensor([[[0, 1]], [[0, 1]], [[1, 255]]])        # (3,1,2)
    ours = retrieval_precision(f, labels, k=1)
    assert ours['precision'] == pytest.approx(60)
    assert ours['chance'] == pytest.approx(100*(4 + 9)/25)
    with pytest.raises(ValueError, match='no cell has a labelled pixel'):
        retrieval_precision(f, labels*0 + 255)


def test_cell_classes_by_vote():
    "Most frequent labelled pixel of a cell, also where cells don't divide the image."
    label = torch.tensor([[0, 0, 2, 255, 255], [1, 0, 2, 255, 255], [3, 3, 1, 1, 255]])
    assert cell_classes(label[None], (1, 1)).item() == 0
    assert cell_classes(label[None, :2], (1, 5)).tolist()[0][0][1:] == [0, 2, 255, 255]


@moderate
@given(h=st.integers(2, 9), w=st.integers(2, 9), grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
       seed=st.integers(0, 99))
def test_soft_labels_are_counted(h, w, grid, seed):
    "Pixel by pixel, also where cells share pixels; class 3 of four never occurs."
    label = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (h, w), generator=seeded(seed))]
    ours = soft_labels(label[None], grid, 4)[0]                    # (4,*grid)
    for y in range(grid[0]):
        rows = range(y*h//grid[0], -(-(y+1)*h//grid[0]))
        for x in range(grid[1]):
            columns = range(x*w//grid[1], -(-(x+1)*w//grid[1]))
            seen = [label[i, j].item() for i in rows for j in columns if label[i, j] != 255]
            expected = [seen.count(c)/max(1, len(seen)) for c in range(4)]
            np.testing.assert_allclose(ours[:, y, x], expected, atol=1e-6)


# In-context k-NN, logistic regression, k-means

def seeded(seed): return torch.Generator().manual_seed(seed)


def maps(*images):
    "Features (n,C,1,w) from a list of cells for each image."
    return torch.tensor(images, dtype=torch.float).movedim(-1, 1)[:, :, None]


def cells_with_classes(n, seed=0, channels=4, spread=.3):
    "Random features (n,channels,4,4), and labels (n,4,4) that are the largest of three channels."
    f = torch.randn(n, channels, 4, 4, generator=seeded(seed))
    labels = f[:, :3].argmax(1)
    return f*spread + F.one_hot(labels, channels).movedim(-1, 1), labels.to(torch.uint8)


def test_knn_segment_by_hand():
    """
    Three memory cells, the third without a labelled pixel, k larger than the memory.
    Weights of the two are e^1.2 : e^1.6 for the first query and e^.56 : e^1.92 for the second, the
    soft labels (1, 0, 0) and (0, 2/3, 1/3): class 0 leads by .401 to .399, then class 1.
    By vote of whole cells, or with pixels of no class as class 0, it would be another one.
    """
    f = maps([(2, 0), (0, 1), (.6, .8)])
    labels = torch.tensor([[[0, 0, 1, 1, 255, 255],
                            [0, 255, 2, 255, 255, 255]]])
    test = maps([(.3, .4), (.28, .96)]), torch.tensor([[[0, 0, 1, 1],
                                                        [0, 255, 2, 1]]])
    ours = knn_segment((f, labels), test, 3, temperature=.5)
    assert ours['prediction'].tolist() == [[[0, 1, 1, 1], [0, 1, 1, 1]]]
    assert ours['iou'] == pytest.approx([100*2/3, 100*3/5, 0])
    assert ours['miou'] == pytest.approx(100*(2/3 + 3/5)/3)
    assert ours['mious'] == [ours['miou']] and ours['accuracy'] == pytest.approx(100*5/7)
    expected = dict(k=2, temperature=.5, memory=2, grid=(1, 2), size=(2, 4))
    assert ours['settings'] == expected
    line = 'in-context k-NN: mIoU 42.2, k 2, temperature 0.5, memory 2, grid 1x2, size 2x4'
    assert score_line(ours) == line


@moderate
@given(k=st.integers(1, 7), temperature=st.sampled_from((.02, .1, 1.)), seed=st.integers(0, 99))
def test_knn_segment_against_a_slow_search(k, temperature, seed):
    "Each cell by itself, sorted by cosine; cells of one pixel, so that nothing is enlarged."
    f, labels = cells_with_classes(2, seed)
    labels[torch.rand(labels.shape, generator=seeded(seed)) < .3] = 255
    test = cells_with_classes(1, seed + 1)
    ours = knn_segment((f, labels), test, 3, k=k, temperature=temperature)
    memory = [(f[i, :, y, x], labels[i, y, x]) for i, y, x in (labels != 255).nonzero()]
    for y in range(4):
        for x in range(4):
            query = test[0][0, :, y, x]
            near = sorted(((F.cosine_similarity(query, cell, dim=0).item(), c.item())
                           for cell, c in memory), reverse=True)[:k]
            votes = [0., 0., 0.]
            for cosine, c in near:
                votes[c] += math.exp((cosine - near[0][0])/temperature)
            assert votes[ours['prediction'][0, y, x]] > max(votes) - 1e-3


@pytest.mark.parametrize('score', [knn_segment, kmeans_score])
def test_seeds_are_reproducible(score):
    "Five draws differ, and are the same the next time; the mean is theirs."
    f = torch.randn(30, 4, 4, 4, generator=seeded(0))
    labels = f[:, :2].argmax(1)
    train, test = (f[:20], labels[:20]), (f[20:], labels[20:])
    size = dict(memory=40) if score is knn_segment else dict(cells=40)
    first, again = (score(train, test, 2, **size) for _ in range(2))
    assert first['mious'] == again['mious'] and torch.equal(first['prediction'], again['prediction'])
    assert len(set(first['mious'])) > 1 and len(first['mious']) == 5
    assert first['miou'] == pytest.approx(np.mean(first['mious']))
    assert first['settings'].items() >= size.items()
    assert f"{min(first['mious']):.1f} to {max(first['mious']):.1f} over 5 seeds" in score_line(first)
    assert score(train, test, 2, seeds=2, **size)['mious'] == first['mious'][:2]


@pytest.mark.parametrize('classes', [2, 3, 5])
def test_logistic_probe_of_separable_cells(classes):
    "Everything right, also where only two classes occur or where two of five never do."
    f, labels = cells_with_classes(20, spread=.01)
    labels = labels.clamp(max=classes - 1)
    ours = logistic_probe((f, labels), (f, labels), classes)
    assert ours['miou'] == 100 and torch.equal(ours['prediction'], labels)
    assert max(ours['held_out'].values()) == 100


def test_logistic_probe_fits_all_training_cells():
    "With the C chosen, the prediction is that of scikit-learn on all cells, standardised."
    scale = torch.tensor([1., 100, .01, 10])[:, None, None]
    f, labels = cells_with_classes(20, 0, spread=1.)
    f = 5 + f*scale
    test = 5 + cells_with_classes(10, 1, spread=1.)[0]*scale, labels[:10]
    ours = logistic_probe((f, labels), test, 3, Cs=(.01, .1, 1.))
    x = f.movedim(1, -1).flatten(0, 2)                             # (320,4)
    mean, std = x.mean(0), x.std(0)
    model = LogisticRegression(C=ours['C'], tol=1e-6).fit((x - mean)/std, labels.flatten())
    p = model.predict_proba((test[0].movedim(1, -1).flatten(0, 2) - mean)/std)      # (160,3)
    chosen = p[np.arange(160), ours['prediction'].flatten().numpy()]
    assert (chosen > p.max(1) - 1e-3).all()


def test_logistic_probe_ignores_pixels_of_no_class():
    "Wild features where nothing is labelled change neither the fit nor the choice of C."
    f, labels = cells_with_classes(20, spread=1.)
    labels[:, :2] = labels[5] = 255
    wild = torch.where(labels[:, None] == 255, 1e4, f)
    test = cells_with_classes(10, 1, spread=1.)
    a, b = (logistic_probe((x, labels), test, 3) for x in (f, wild))
    assert torch.equal(a.pop('prediction'), b.pop('prediction')) and a == b
    wild_test = torch.where(test[1][:, None] == 0, 1e4, test[0])
    dropped = test[1].where(test[1] != 0, 255)
    a, b = (logistic_probe((f, labels), (x, dropped), 3) for x in (test[0], wild_test))
    assert a['mious'] == b['mious'] and a['settings']['cells'] == 19*8


def test_C_is_chosen_on_images_held_out():
    "More channels than cells: what is fitted is learned by heart, what is held out stays chance."
    f = torch.randn(20, 400, 4, 4, generator=seeded(0))
    labels = torch.randint(0, 3, (20, 4, 4), generator=seeded(1), dtype=torch.uint8)
    ours = logistic_probe((f, labels), (f, labels), 3, Cs=(100., 1.))
    assert ours['miou'] > 99 and max(ours['held_out'].values()) < 50
    assert ours['held_out'][ours['C']] == max(ours['held_out'].values())
    assert list(ours['held_out']) == [1., 100.]


def test_C_at_the_edge_is_said():
    "Inside the grid, at its edge, and where there is no choice."
    f, labels = cells_with_classes(20, spread=.01)
    f[:, :3] += 5*(f[:, :3].argmax(1) == 0)[:, None]               # shrunk weights lose a class
    train = f, labels
    edge = logistic_probe(train, train, 3, Cs=(1., 10.))
    inside = logistic_probe(train, train, 3, Cs=(1e-9, edge['C'], 10.))
    only = logistic_probe(train, train, 3, Cs=(edge['C'],))
    assert edge['at_edge'] and 'C lies at the edge of its grid' in score_line(edge)
    assert inside['held_out'][1e-9] < 100 and inside['C'] == edge['C'] == 1
    for result in (inside, only):
        assert not result['at_edge'] and 'edge' not in score_line(result)


def test_clusters_are_matched_by_hand():
    "Of 10, 9, 9 and 1 pixels the best assignment has 9 + 9 right, each class 9 of a union of 20."
    train = maps([(1, 0), (0, 1)]*10), torch.zeros(1, 1, 20, dtype=torch.uint8)
    counts = {(0, 0): 10, (0, 1): 9, (1, 0): 9, (1, 1): 1}         # label, kind of cell
    pixels = [pair for pair, n in counts.items() for _ in range(n)]
    labels, kinds = torch.tensor(pixels).T
    test = F.one_hot(kinds).T[None, :, None].float(), labels[None, None]
    ours = kmeans_score(train, test, 2)
    assert ours['mious'] == pytest.approx([45]*5) and ours['iou'] == pytest.approx([45, 45])
    assert torch.equal(ours['prediction'][0, 0], 1 - kinds.to(torch.uint8))


def test_clusters_need_no_labels_and_no_order():
    "Pure clusters give 100 whatever their order, their length, and the training labels."
    f, labels = cells_with_classes(20, spread=.01)
    f *= 1 + torch.rand(20, 1, 4, 4, generator=seeded(2))
    ours = kmeans_score((f, labels*0), (f, labels), 3)
    assert ours['mious'] == [100]*5 and torch.equal(ours['prediction'], labels)
    order = torch.tensor([2, 0, 1], dtype=torch.uint8)
    assert kmeans_score((f, labels), (f, order[labels.long()]), 3)['mious'] == [100]*5


def test_clusters_are_nearest_by_distance():
    "A narrow cluster at 0 degrees, a wide one about 90: 46 degrees is nearer to the wide one's mean."
    angle = torch.tensor([0.]*100 + [70.]*10 + [110.]*10 + [0, 90, 46]).deg2rad()
    f = torch.stack([angle.cos(), angle.sin()])[None, :, None]     # (1,2,1,123)
    labels = torch.tensor([[[0, 1, 1]]], dtype=torch.uint8)
    ours = kmeans_score((f[..., :120], labels.new_zeros(1, 1, 120)), (f[..., 120:], labels), 2)
    assert ours['mious'] == [100]*5


def test_scores_refuse():
    "No labelled cell, and a single image from which C would have to be chosen."
    f, labels = cells_with_classes(3)
    for score in (knn_segment, logistic_probe):
        with pytest.raises(ValueError, match='no cell has a labelled pixel|two training images'):
            score((f, torch.full_like(labels, 255)), (f, labels), 3)
    labels[1:] = 255
    with pytest.raises(ValueError, match='needs two training images with labels'):
        logistic_probe((f, labels), (f, labels), 3)


def test_features_for_all_scores():
    "One reading of the data; images and labels brought to a size."
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8)
    labels = (images[:, 0] > 127).long()
    calls, net = [], tiny()
    net.register_forward_hook(lambda *_: calls.append(1))
    data = f, small = labelled_features(net, (images, labels), 2, size=(16, 24))
    assert f.shape == (4, 6, 4, 6) and small.shape == (4, 16, 24) and len(calls) == 1
    for score in (knn_segment, logistic_probe, kmeans_score):
        result = score(data, data, 2)
        assert result['prediction'].shape == small.shape and 0 < result['miou'] <= 100
        assert result['settings'].items() >= dict(grid=(4, 6), size=(16, 24)).items()
    assert len(calls) == 1


# Health

def test_health_of_known_features():
    "Two opposite vectors; one vector; orthonormal vectors."
    two = torch.tensor([[1., 0], [-1, 0]]).repeat(50, 1)
    pairs = [math.exp(-8)]*(50*50) + [1.]*(2*50*49//2)
    expected = math.log(sum(pairs)/len(pairs))
    assert feature_health(two)['uniformity'] == pytest.approx(expected, abs=1e-4)
    assert feature_health(two)['rank'] == pytest.approx(1)
    same = feature_health(torch.ones(20, 8, 2, 2))
    assert same['spread'] == pytest.approx(0, abs=1e-6)
    assert same['uniformity'] == pytest.approx(0, abs=1e-6)
    basis = feature_health(torch.eye(16)*torch.arange(1, 17)[:, None])
    assert basis['uniformity'] == pytest.approx(-4, abs=1e-4)
    assert basis['rank'] == pytest.approx(15, abs=1e-3)


# Results of many runs

def leave(folder, **result):
    "Writes one result below a folder."
    result = dict(task='segment', data='voc:/data/VOCdevkit', variant='sr', seed=0) | result
    path = folder/str(len(list(folder.rglob('*.json'))))/'result.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return path


def test_table_by_hand(tmp_path):
    "Mean, the sample's deviation, n; methods in their order; null and NaN are left out."
    for seed, miou in enumerate((40., 42., 44.)):
        leave(tmp_path, seed=seed, miou=miou, accuracy=None, iou={})
    leave(tmp_path, variant='random', miou=30., accuracy=math.nan)
    leave(tmp_path, variant='mine', task='detect', box_ap=1.25, mask_ap=None)
    table = results_table(read_results(tmp_path))
    assert list(table.index) == ['random weights', 'PixCon-SR', 'mine']
    assert list(table.columns) == [('detect VOCdevkit', 'box AP'), ('segment VOCdevkit', 'mIoU')]
    assert table['detect VOCdevkit', 'box AP'].tolist() == ['', '', '1.2 (n=1)']
    assert table['segment VOCdevkit', 'mIoU'].tolist() == ['30.0 (n=1)', '42.0 ± 2.0 (n=3)', '']


def test_repeats_are_no_seeds(tmp_path):
    "The same seed evaluated twice counts once, with the mean of the two."
    for seed, miou in ((0, 40.), (0, 42.), (0, 42.), (1, 45.)):
        leave(tmp_path, seed=seed, miou=miou)
    assert results_table(read_results(tmp_path)).to_numpy().tolist() == [['43.0 ± 2.8 (n=2)']]


def test_runs_that_differ_are_not_averaged(tmp_path):
    "Other settings of a task and other epochs of pre-training have their own column and row."
    for epochs, miou in ((12, 40.), (48, 42.)):
        leave(tmp_path, task='probe', epochs=epochs, miou=miou, settings=dict(stride=8))
    leave(tmp_path, task='probe', variant='random', epochs=0, miou=20., settings=dict(stride=8))
    for iterations, miou in ((200, 50.), (400, 52.)):
        same = dict(lr=.1, checkpoint=str(miou), seed=miou)        # the last two may differ
        leave(tmp_path, miou=miou, settings=dict(iterations=iterations) | same)
    results = read_results(tmp_path)
    assert set(results['task']) == {'probe VOCdevkit', 'segment VOCdevkit, iterations 200',
                                    'segment VOCdevkit, iterations 400'}
    assert set(results['variant']) == {'random weights', 'PixCon-SR', 'PixCon-SR, 12 epochs',
                                       'PixCon-SR, 48 epochs'}
    assert results_table(results).shape == (4, 3)


@pytest.mark.parametrize('text', ['{"task": "probe"}', '{"task": ', '[1, 2]', '\x00'])
def test_other_files_are_named(tmp_path, text):
    "A file of that name which is no result is passed over, the others are read."
    leave(tmp_path, miou=1.).write_text(text)
    leave(tmp_path, miou=2.)
    with pytest.warns(UserWarning, match=r'passed over: .*result.json. is no result'):
        assert read_results(tmp_path)['value'].tolist() == [2.]


def test_probe_result_is_measured_once(tmp_path):
    "Read from the file while the question is the same, measured anew when it is not."
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    data = images, (images[:, 0] > 127).long()
    calls = []
    net = tiny()
    net.register_forward_hook(lambda *_: calls.append(1))
    about = dict(data='noise', variant='random', seed=0, steps=10)
    path = tmp_path/'new'/'result.json'
    question = dict(about=about, epochs=1, size=(8, 8))
    first = probe_result(path, net, data, data, 2, **question)
    n = len(calls)
    assert probe_result(path, net, data, data, 2, **question) == first and len(calls) == n
    assert read_results(tmp_path)['value'].tolist() == [first['miou'], first['accuracy']]
    for change in (dict(epochs=2), dict(size=(4, 4)), dict(about=about | dict(steps=11))):
        again = probe_result(path, net, data, data, 2, **question | change)
        assert again != first and len(calls) > n
        n = len(calls)


def results_notebook(folder, **parameters):
    "Runs results.ipynb in a folder; returns the finished process."
    flags = [a for n, v in parameters.items() for a in ('-p', n, str(v))]
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')}
    command = ['papermill', ROOT/'nbs'/'results.ipynb', 'out.ipynb', '--no-progress-bar', *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('wrong,message', [
    (dict(runs='/no/such/folder'), "'/no/such/folder' is no folder"),
    ({}, "'nbs/studies' is no folder"),
    (dict(run='.'), "unknown parameter"),
    (dict(runs='.', height='abc'), "height must be a whole number of at least 1, got 'abc'"),
])
def test_notebook_stops_without_runs(tmp_path, wrong, message):
    "A folder that is not there and a misspelt parameter are errors, and nothing is written."
    stopped = results_notebook(tmp_path, **wrong)
    assert stopped.returncode != 0 and message in stopped.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['out.ipynb']


def test_notebook_shows_no_invented_results(tmp_path):
    "An empty folder: it says so and writes nothing. With results: table, data, picture."
    runs = tmp_path/'runs'
    runs.mkdir()
    empty = results_notebook(tmp_path, runs='runs')
    assert empty.returncode == 0, empty.stderr[-3000:]
    assert not list(runs.iterdir())
    assert 'No results below' in (tmp_path/'out.ipynb').read_text()
    leave(runs, miou=40.)
    leave(runs, miou=42., seed=1)
    full = results_notebook(tmp_path, runs='runs', out='made')
    assert full.returncode == 0, full.stderr[-3000:]
    made = sorted(p.name for p in (tmp_path/'made').iterdir())
    assert made == ['results.csv', 'results.md', 'results.png']
    expected = '|  | segment VOCdevkit, mIoU |\n|---|---|\n| PixCon-SR | 41.0 ± 1.4 (n=2) |\n'
    assert (tmp_path/'made'/'results.md').read_text() == expected
