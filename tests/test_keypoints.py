"PCK against hand-counted cases, with a backbone that knows every place; readers of files written here."
import json
import math
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from pixcon.augment import imagenet_mean, imagenet_std
from pixcon.keypoints import (
    KeypointPairs, Pair, ScenePairs, correct, mean_colour, open_pairs, pck, read_at, show_pair,
    to_view, transfer_points)

CODES = torch.arange(64, dtype=torch.uint8).view(8, 8)             # a number for each cell


class Known(nn.Module):
    "Reads the number that each cell of a picture is painted with: one channel for each number."
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, x): # (N,3,128,128) normalised
        self.seen += len(x)
        red = x[:, 0, 8::16, 8::16]*imagenet_std[0] + imagenet_mean[0]
        code = (red*255/4).round().long()                              # (N,8,8)
        return self.gain*F.one_hot(code, 64).permute(0, 3, 1, 2).float()


def painted(codes, height=16, width=16):
    "A picture (3,H,W) whose cells of height x width pixels show their numbers."
    return (4*codes).repeat_interleave(height, 0).repeat_interleave(width, 1).expand(3, -1, -1)


class Pictures(KeypointPairs):
    "Pairs of pictures in memory, which counts how often one is read."
    def __init__(self, pairs, **pictures):
        super().__init__(pairs)
        self.pictures, self.read = pictures, 0

    def image(self, name):
        self.read += 1
        return self.pictures[name]


def centre(*cells):
    "Centres (y, x) of cells in pixels."
    return 16*(torch.tensor(cells, dtype=torch.double) + .5)


CELLS = centre((2, 2), (3, 5), (5, 4))


@pytest.mark.parametrize('shift', [(0, 0), (1, 2), (2, -1), (-2, -2)])
def test_shifts_of_known_size(shift):
    "Every point is found where the picture was moved to; at the cells' centres, exactly."
    there = CELLS + 16*torch.tensor(shift)
    pair = Pair('a', 'b', CELLS, there, (0, 0, 1, 1), 'x')
    data = Pictures([pair], a=painted(CODES), b=painted(CODES.roll(shift, (0, 1))))
    result = pck(Known(), data, 128, step=16)
    assert torch.allclose(result['found'][0], there) and result['pck'] == 100
    assert result['same_place'] == (100 if shift == (0, 0) else 0)
    finer = pck(Known(), data, 128)['found'][0]                        # no centre is tried
    assert (finer - there).abs().max() <= 2


def test_mirrored_target():
    "The columns are counted from the other side."
    mirrored = torch.stack([CELLS[:, 0], 128 - CELLS[:, 1]], 1)
    pair = Pair('a', 'b', CELLS, mirrored, (0, 0, 9, 9), 'x')
    data = Pictures([pair], a=painted(CODES), b=painted(CODES).flip(-1))
    result = pck(Known(), data, 128, step=16)
    assert torch.allclose(result['found'][0], mirrored) and result['pck'] == 100


@pytest.mark.parametrize('height,width', [(8, 32), (48, 16), (32, 32)])
def test_images_of_two_sizes(height, width):
    "Places are in pixels of the target photo, and so are distances, whatever the source's size."
    there = CELLS/16*torch.tensor([height, width])
    pictures = dict(a=painted(CODES), b=painted(CODES, height, width))
    forth = Pair('a', 'b', CELLS, there, (0, 0, 10, 10), 'x')
    back = Pair('b', 'a', there, CELLS, (0, 0, 10, 10), 'x')
    result = pck(Known(), Pictures([forth, back], **pictures), 128, step=16)
    for found, true in zip(result['found'], (there, CELLS)):
        assert torch.allclose(found, true)
    assert result['same_place'] == 100
    off = Pair('a', 'b', CELLS, there + torch.tensor([0, 5.]), (0, 0, 50, 1), 'x')
    more = Pair('a', 'b', CELLS, there + torch.tensor([0, 5.1]), (0, 0, 50, 1), 'x')
    assert pck(Known(), Pictures([off, more], **pictures), 128, step=16)['pck'] == 50


def test_border_of_inclusion():
    "Alpha times the longer side counts, a little more doesn't; the shorter side says nothing."
    off = torch.tensor([[0, 8.], [4.8, 6.4], [8.01, 0]], dtype=torch.double)
    for box in ((0, 0, 80, 3), (50, 60, 3, 80)):
        pair = Pair('a', 'a', CELLS, CELLS + off, box, 'x')
        data = Pictures([pair], a=painted(CODES))
        for alpha, counted in ((.1, 2), (.099, 0), (.11, 3)):
            assert pck(Known(), data, 128, alpha, step=16)['pck'] == pytest.approx(100*counted/3)
            assert correct(CELLS, pair, alpha).sum() == counted


@pytest.mark.parametrize('alpha,side', [(.1, 30), (.29, 100), (.7, 10), (.05, 60)])
def test_rounding_does_not_decide(alpha, side):
    "Products such as .29*100, which is a little less than 29, still count at the border."
    pair = Pair('a', 'b', [[0, 0]], [[0, 0]], (0, 0, side, 1), 'x')
    assert correct(torch.tensor([[0., round(alpha*side)]]), pair, alpha).all()


def test_means_over_points_pairs_and_classes():
    "Three right of one pair, one wrong of another: 75 over points, 50 over pairs."
    right = Pair('a', 'a', CELLS, CELLS, (0, 0, 10, 10), 'cat')
    wrong = Pair('a', 'a', CELLS[:1], CELLS[:1] + 3, (0, 0, 10, 10), 'dog')
    result = pck(Known(), Pictures([right, wrong], a=painted(CODES)), 128, step=16)
    assert (result['pck'], result['pck_per_pair']) == (75, 50)
    assert (result['points'], result['pairs']) == (4, 2)
    classes = result['classes']
    assert {n: (c['pck'], c['points'], c['pairs']) for n, c in classes.items()} == \
        {'cat': (100, 3, 1), 'dog': (0, 1, 1)}


def test_chance_is_counted_place_by_place():
    "By a loop over all places tried, in the photo's pixels."
    pair = Pair('a', 'b', CELLS, CELLS*torch.tensor([1., 2]), (0, 0, 70, 120), 'x')
    data = Pictures([pair], a=painted(CODES), b=painted(CODES, 16, 32))
    hits = 0
    for y, x in pair.target_points.tolist():
        for row in range(32):
            for column in range(32):
                dy, dx = (row + .5)*4 - y, (column + .5)*8 - x
                hits += math.hypot(dy, dx) <= 12
    assert pck(Known(), data, 128)['chance'] == pytest.approx(100*hits/3/32**2)
    assert pck(Known(), data, 128, alpha=10)['chance'] == 100


def test_each_image_is_read_and_computed_once():
    "However many pairs it is in; the backbone is left in the mode it was in."
    pictures = {n: painted(CODES) for n in 'abc'}
    pairs = [Pair(m, n, CELLS, CELLS, (0, 0, 9, 9), 'x') for m in 'abc' for n in 'abc']
    data, backbone = Pictures(pairs, **pictures), Known().train()
    assert pck(backbone, data, 128)['pairs'] == 9
    assert (data.read, backbone.seen, backbone.training) == (3, 3, True)


def test_reading_between_cells():
    "Against the four cells around a place, weighted by hand; beyond the outermost they go on."
    f = torch.randn(3, 4, 5, dtype=torch.double)
    for y, x in ((.4, .5), (.13, .91), (.51, .3), (0, 0), (1, .5), (.03, .99)):
        v, u = min(max(y*4 - .5, 0), 3), min(max(x*5 - .5, 0), 4)      # cells from the first centre
        i, j = min(int(v), 2), min(int(u), 3)
        a, b = v - i, u - j
        hand = ((1-a)*(1-b)*f[:, i, j] + (1-a)*b*f[:, i, j+1]
                + a*(1-b)*f[:, i+1, j] + a*b*f[:, i+1, j+1])
        assert torch.allclose(read_at(f, torch.tensor([[y, x]], dtype=torch.double))[0], hand)


def test_places_between_cells():
    "Features that turn steadily with the place are found to half a step, not to half a cell."
    centres = (torch.arange(6) + .5)/6
    def turned(x): return torch.stack([(2*x).cos(), (2*x).sin()])      # (2,...)
    f = turned(centres)[:, None].expand(2, 3, 6)
    for x in (.2, .33, .47, .5, .61, .78):
        query = turned(torch.tensor([[x]]))[:, :, :].expand(2, 1, 1)   # a source of one cell
        found = transfer_points(query, f, torch.tensor([[.5, .5]]), (3, 120))
        assert abs(found[0, 1].item() - x) < .5/120 + .004


def test_longer_features_win_nothing():
    "The cosine decides: a target cell of a hundred times the length is not preferred."
    f = F.normalize(torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(0)), dim=0)
    louder = f.clone()
    louder[:, 0, 0] *= 100
    places = (torch.tensor([[1, 2], [3, 1], [2, 2]]) + .5)/4
    assert torch.allclose(transfer_points(f, louder, places, (4, 4)), places.double())


def test_a_loud_neighbour_does_not_pull():
    "Halfway between two cells is found there, though the features of one are far longer."
    f = torch.tensor([[[1., 1, 0, 0]], [[0, 0, 100, 100]]])            # (2,1,4)
    halfway = torch.ones(2, 1, 1)
    found = transfer_points(halfway, f, torch.tensor([[.5, .5]]), (1, 36))
    assert abs(found[0, 1].item() - .5) <= .5/36 + 1e-6


def test_outermost_places():
    "Beyond the outermost centres all places are alike; the centre stands for them."
    corners = torch.tensor([[0., 0], [0, 1], [1, 0], [1, 1]])
    f = F.one_hot(CODES.long(), 64).permute(2, 0, 1).float()
    found = transfer_points(f, f, corners, (32, 32))
    assert torch.allclose(found, corners.double().clamp(.5/8, 1 - .5/8))


def test_mean_colour_of_cells():
    "As a loop over the cells says."
    x = torch.rand(1, 3, 12, 8)
    for i in range(3):
        for j in range(2):
            hand = x[0, :, 4*i:4*i+4, 4*j:4*j+4].mean((1, 2))
            assert torch.allclose(mean_colour(4)(x)[0, :, i, j], hand, atol=1e-6)


@pytest.mark.parametrize('points,outside', [
    ([[90., 30]], 'y = 90, x = 30'),
    ([[-1., 3]], 'y = -1, x = 3'),
])
def test_points_outside_their_photo(points, outside):
    "Are refused with the photo's name and size; its far edges belong to it."
    photo = torch.zeros(3, 40, 100, dtype=torch.uint8)
    pair = Pair('a', 'b', [[3, 3]], points, (0, 0, 9, 9), '')
    message = f"'b' has 40 x 100 pixels .*at {outside}; are x and y exchanged"
    with pytest.raises(ValueError, match=message):
        pck(mean_colour(8), Pictures([pair], a=photo, b=photo), 64)
    edge = Pair('a', 'a', [[0, 0]], [[40, 100]], (0, 0, 9, 9), '')
    assert pck(mean_colour(8), Pictures([edge], a=photo), 64)['points'] == 1


@pytest.mark.parametrize('source,target,box,message', [
    ([[1, 1]], [[1, 1], [2, 2]], (0, 0, 5, 5), '1 source points and 2 target points'),
    ([], [], (0, 0, 5, 5), 'at least one'),
    ([[1, 1]], [[1, 1]], (0, 0, 0, 5), r'box \(0, 0, 0, 5\)'),
    ([[1, 1]], [[1, 1]], (7, 7, -2, 5), 'height and width above 0'),
])
def test_unfit_pairs(source, target, box, message):
    with pytest.raises(ValueError, match=message):
        Pair('a', 'b', source, target, box, 'x')


def save(path, height=30, width=40, seed=0):
    "A random photo."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_table(folder, change=lambda content: None):
    "Three photos with four keypoints each; pairs with two, one and no common points."
    see = lambda *on: [[10*k + 1, k + 2, int(k in on)] for k in range(4)]
    content = dict(
        images=dict(a=dict(cls='cat', bbox=[1, 2, 31, 22], keypoints=see(0, 1, 3)),
                    b=dict(cls='cat', bbox=[5, 3, 35, 28], keypoints=see(1, 2, 3)),
                    c=dict(cls='cat', bbox=[0, 0, 40, 30], keypoints=see(0))),
        pairs=[['a', 'b'], ['c', 'a'], ['b', 'c']])
    change(content)
    for name in 'abc':
        save(folder/'images'/f'{name}.{"png" if name == "b" else "jpg"}', seed=ord(name))
    (folder/'keypoints.json').write_text(json.dumps(content))


def test_table(tmp_path):
    "Common points only, as (y, x); the target's box and class; pairs without any are counted."
    write_table(tmp_path)
    data = open_pairs(str(tmp_path))
    assert (len(data), data.left_out, len(data.images)) == (2, 1, 3)
    pair = data[0]
    assert pair.source.name == 'a.jpg' and pair.target.name == 'b.png' and pair.class_name == 'cat'
    assert pair.source_points.tolist() == [[3, 11], [5, 31]] == pair.target_points.tolist()
    assert pair.box == (3, 5, 25, 30)
    assert data[1].source_points.tolist() == [[2, 1]] and data[1].box == (2, 1, 20, 30)
    assert data.image(pair.source).shape == (3, 30, 40)
    assert '1 without a common point left out' in repr(data) and '3 points' in repr(data)
    assert pck(mean_colour(8), data, (32, 48))['points'] == 3


def remove(content, *keys):
    for key in keys[:-1]: content = content[key]
    del content[keys[-1]]


@pytest.mark.parametrize('change,message', [
    (lambda c: c.pop('pairs'), "has no 'pairs'; wanted are images, pairs"),
    (lambda c: remove(c, 'images', 'b', 'keypoints'), "image 'b' in .* has no 'keypoints'"),
    (lambda c: remove(c, 'images', 'a', 'keypoints', 0), "'a' has 3 and 'b' has 4"),
    (lambda c: c['pairs'].append(['a', 'zebra']), "names 'zebra', which is not among"),
    (lambda c: remove(c, 'images', 'a', 'bbox', 0), 'left, top, right, bottom, got'),
    (lambda c: remove(c, 'images', 'a', 'keypoints', 1, 2),
     "keypoints of 'a' in .* is no list of points"),
    (lambda c: c['images']['a'].update(keypoints=[[1, 2]]*4), 'must have 3 numbers for each point'),
    (lambda c: c.update(pairs=[['b', 'c']]), r'no pairs to score \(1 without a common point'),
])
def test_unfit_tables(tmp_path, change, message):
    write_table(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path)


def test_table_without_an_image(tmp_path):
    "Said at opening, with the name."
    write_table(tmp_path)
    (tmp_path/'images'/'b.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 3 images are not there, .*images/b'):
        open_pairs(tmp_path)
    (tmp_path/'keypoints.json').write_text('{"images": ')
    with pytest.raises(ValueError, match='is no JSON file'):
        open_pairs(tmp_path)
    (tmp_path/'keypoints.json').write_text('[1]')
    with pytest.raises(ValueError, match='holds a list'):
        open_pairs(tmp_path)


def write_spair(folder, change=lambda content: None):
    "Two test pairs and a training pair in the layout of SPair-71k."
    pairs = [('test', '000001-cow', 'cow', 'p', 'q', [[5, 6], [30, 8]], [[7, 20], [31, 2]]),
             ('test', '000002-dog', 'dog', 'r', 'r', [[1, 2]], [[3, 4]]),
             ('trn', '000001-dog', 'dog', 'r', 'r', [[9, 9]], [[9, 9]])]
    for split, name, category, source, target, src_kps, trg_kps in pairs:
        content = dict(
            src_imname=f'{source}.jpg', trg_imname=f'{target}.jpg', category=category,
            src_kps=src_kps, trg_kps=trg_kps, src_bndbox=[1, 1, 2, 2], trg_bndbox=[4, 2, 34, 22],
            pair_id=1, kps_ids=['0', '1'], src_imsize=[40, 30, 3], mirror=0)
        change(content)
        for image in (source, target):
            save(folder/'JPEGImages'/category/f'{image}.jpg', seed=ord(image))
        file = folder/'PairAnnotation'/split/f'{name}.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))


@pytest.mark.parametrize('below', ['', 'SPair-71k'])
def test_spair(tmp_path, below):
    "x, y become (y, x), the box becomes (top, left, height, width); in order of the files."
    write_spair(tmp_path/below)
    data = open_pairs(str(tmp_path))
    assert [p.class_name for p in data] == ['cow', 'dog'] and data.kind == 'SPair-71k'
    assert data[0].source == tmp_path/below/'JPEGImages'/'cow'/'p.jpg'
    assert data[0].target == tmp_path/below/'JPEGImages'/'cow'/'q.jpg'
    assert data[0].source_points.tolist() == [[6, 5], [8, 30]]
    assert data[0].target_points.tolist() == [[20, 7], [2, 31]]
    assert data[0].box == (2, 4, 20, 30)
    assert open_pairs(tmp_path, 'trn')[0].source_points.tolist() == [[9, 9]]
    assert set(pck(mean_colour(8), data, 32)['classes']) == {'cow', 'dog'}
    with pytest.raises(ValueError, match="no split 'val', there are: test, trn"):
        open_pairs(tmp_path, 'val')


@pytest.mark.parametrize('change,message', [
    (lambda c: c.pop('trg_kps'), "json' has no 'trg_kps'; wanted are src_imname"),
    (lambda c: c['trg_kps'].append([1, 1]), 'source points and .* target points'),
    (lambda c: c.update(src_kps=[]), '0 source points and'),
    (lambda c: c.update(src_kps=[[1, 2, 3]]), 'src_kps in .* must have 2 numbers for each point'),
    (lambda c: c.update(trg_bndbox=[4, 9, 34, 9]), 'height and width above 0'),
    (lambda c: c.update(src_kps=[], trg_kps=[]), r'no pairs to score \(2 without'),
])
def test_unfit_spair_files(tmp_path, change, message):
    write_spair(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path)


def test_unknown_folders_and_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder. Keypoint pairs are 'scenes'"):
        open_pairs(tmp_path/'nothing')
    with pytest.raises(FileNotFoundError, match='has neither PairAnnotation/'):
        open_pairs(tmp_path)
    write_table(tmp_path)
    for data in (tmp_path, 'scenes'):
        with pytest.raises(ValueError, match="no split 'train', there are: test"):
            open_pairs(data, 'train')


def test_places_in_a_view():
    "By hand: inside the box, at its corners, and counted from the other side when mirrored."
    places, box = torch.tensor([[20., 8], [26, 12], [23, 11]]), torch.tensor([20, 8, 6, 4])
    assert to_view(places, box, False, 12).tolist() == [[0, 0], [12, 12], [6, 9]]
    assert to_view(places, box, True, 12).tolist() == [[0, 12], [12, 0], [6, 3]]


def test_scene_points_are_the_same_place():
    "Views cut in the same way from a picture that shows at each pixel its own row and column."
    data = ScenePairs(8, 64)
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing='ij')
    data.views.images = [torch.stack([2*y, 2*x, y]).to(torch.uint8)]*8
    drawn = [data.views[i] for i in range(8)]
    assert any(v['flip'][0] != v['flip'][1] for v in drawn)
    for pair, v in zip(data, drawn):
        a = read_at(v['view'][0].float(), pair.source_points/64)
        b = read_at(v['view'][1].float(), pair.target_points/64)
        assert (a - b)[:, :2].abs().max() < 4                          # two pixels of the scene


def test_scene_pairs():
    "The same each time, two different views, points inside the image and the target's in the box."
    first, again = open_pairs(n=6, size=64), ScenePairs(6, 64)
    for a, b in zip(first, again):
        assert torch.equal(a.source_points, b.source_points) and a.box == b.box
        assert torch.equal(first.image(a.target), again.image(b.target))
        assert not torch.equal(first.image(a.source), first.image(a.target))
        assert 1 < len(a.source_points) <= 8
        for points in (a.source_points, a.target_points):
            assert (points >= 0).all() and (points <= 64).all()
        top, left, height, width = a.box
        inside = a.target_points - torch.tensor([top, left])
        assert (inside >= 0).all() and (inside <= torch.tensor([height, width])).all()
        assert min(top, left) > -1 and top + height < 65 and left + width < 65
    assert len({tuple(p.box) for p in first}) == 6


def test_picture_marks_what_is_wrong():
    "A cross for each point that was not found, and the count in the title."
    pair = Pair('a', 'b', CELLS, CELLS, (10, 10, 60, 50), 'cat')
    data = Pictures([pair], a=painted(CODES), b=painted(CODES))
    off = torch.tensor([[0, 0], [0, 20.], [-7, 0]])
    for found, crosses in ((None, 0), (CELLS + off, 2)):
        ax = show_pair(data, 0, found, title='known')
        assert sum(line.get_marker() == 'X' for line in ax.lines) == crosses
        assert ax.get_title() == f'known, cat: {3 - crosses} of 3 points found'
        assert ax.figure.get_figwidth()*ax.figure.dpi >= 800
        plt.close(ax.figure)
