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
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.functional.classification import multiclass_jaccard_index
from pixcon.labelled import open_labelled
from pixcon.probe import cell_classes, cell_features, feature_health, knn_score, linear_probe
from pixcon.probe import nearest_cells, probe_result, read_results, resized, results_table, scores

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


# Retrieval and health

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


def test_knn_score_by_hand():
    "Three images of two cells: right for three of five labelled cells; the sixth has no label."
    f = torch.tensor([[[1., 0], [0, 1]], [[.9, .1], [.2, 1]], [[1, .2], [1, .3]]])
    f = f.permute(0, 2, 1)[:, :, None]                             # (3,2,1,2)
    labels = torch.tensor([[[0, 1]], [[0, 1]], [[1, 255]]])        # (3,1,2)
    ours = knn_score(f, labels, k=1)
    assert ours['knn'] == pytest.approx(60)
    assert ours['chance'] == pytest.approx(100*(4 + 9)/25)
    with pytest.raises(ValueError, match='no cell has a labelled pixel'):
        knn_score(f, labels*0 + 255)


def test_cell_classes_by_vote():
    "Most frequent labelled pixel of a cell, also where cells don't divide the image."
    label = torch.tensor([[0, 0, 2, 255, 255], [1, 0, 2, 255, 255], [3, 3, 1, 1, 255]])
    assert cell_classes(label[None], (1, 1)).item() == 0
    assert cell_classes(label[None, :2], (1, 5)).tolist()[0][0][1:] == [0, 2, 255, 255]


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
    "A file of that name which is no result."
    leave(tmp_path, miou=1.).write_text(text)
    with pytest.raises(ValueError, match=r'result.json. is no result'):
        read_results(tmp_path)


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
    ({}, "'runs' is no folder"),
    (dict(run='.'), "unknown parameter"),
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
    empty = results_notebook(tmp_path)
    assert empty.returncode == 0, empty.stderr[-3000:]
    assert not list(runs.iterdir())
    assert 'No results below' in (tmp_path/'out.ipynb').read_text()
    leave(runs, miou=40.)
    leave(runs, miou=42., seed=1)
    full = results_notebook(tmp_path, out='made')
    assert full.returncode == 0, full.stderr[-3000:]
    made = sorted(p.name for p in (tmp_path/'made').iterdir())
    assert made == ['results.csv', 'results.md', 'results.png']
    expected = '|  | segment VOCdevkit, mIoU |\n|---|---|\n| PixCon-SR | 41.0 ± 1.4 (n=2) |\n'
    assert (tmp_path/'made'/'results.md').read_text() == expected
