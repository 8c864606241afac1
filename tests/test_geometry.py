"""Boxes, overlap and matching against brute force: every sub-pixel is traced back to the image.

A crop of H x W pixels on a grid of h x w cells is cut into H*h x W*w sub-pixels, so that a cell
holds exactly H x W of them and all counts and distances are whole numbers: y in units of 1/(2h)
of a pixel, x in units of 1/(2w).
"""
from collections import deque
from fractions import Fraction
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pixcon.augment import TwoViews, random_box, two_boxes
from pixcon.loss import Queue, info_nce
from pixcon.matching import cell_centres, match_coord, overlap

moderate = settings(max_examples=60, deadline=None, derandomize=True)
few = settings(moderate, max_examples=25)

side, flips = st.integers(1, 24), st.tuples(st.booleans(), st.booleans())
grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def pairs(draw, touching=True):
    "Two boxes in one image as int64 (1,2,4), sharing at least a pixel if touching."
    extent = draw(side), draw(side)
    def box():
        start = [draw(st.integers(0, n-1)) for n in extent]
        return *start, *(draw(st.integers(1, n-s)) for n, s in zip(extent, start))
    boxes = box(), box()
    if touching:
        assume(shared_area(*boxes))
    return torch.tensor([boxes])


def shared_area(a, b):
    "Pixels two boxes share."
    spans = (min(a[d]+a[d+2], b[d]+b[d+2]) - max(a[d], b[d]) for d in (0, 1))
    return np.prod([max(0, s) for s in spans])


def sub_pixels(box, flip, grid):
    "Original y (rows,) and x (columns,) of a view's sub-pixel centres, in the units above."
    (top, left, height, width), (h, w) = box, grid
    y = 2*h*top + 2*np.arange(height*h) + 1
    x = 2*w*left + 2*np.arange(width*w) + 1
    return y, x[::-1] if flip else x


def cells(values, n):
    "Cuts the sub-pixels of an axis into n cells, (n, sub-pixels)."
    return values.reshape(n, -1)


def centres(box, flip, grid):
    "Cell centres as the mean of their sub-pixels, (S,2) whole numbers (y,x)."
    means = [cells(v, n).sum(1)//(len(v)//n) for v, n in zip(sub_pixels(box, flip, grid), grid)]
    return np.stack(np.meshgrid(*means, indexing='ij'), -1).reshape(-1, 2)


def contains(box, points, grid):
    "Whether points lie in [top, top+height) x [left, left+width)."
    start, end = (2*np.array(grid)*p for p in (box[:2], np.add(box[:2], box[2:])))
    return ((points >= start) & (points < end)).all(-1)


def squared_distances(box, flip, grid, query):
    "Between all query and key cell centres, (S,S) whole numbers in units of 1/(2hw)^2 pixels."
    q, k = (centres(box[v], flip[v], grid) for v in (query, 1-query))
    return (((q[:, None] - k[None])*grid[::-1])**2).sum(-1)


def shared_by_counting(box, flip, grid, view):
    "Rule 'area' by counting: at least half of a cell's sub-pixels lie in the other crop."
    other, counts = box[1-view], []
    for d, values in enumerate(sub_pixels(box[view], flip[view], grid)):
        start, end = 2*grid[d]*other[d], 2*grid[d]*(other[d] + other[d+2])
        counts.append(cells((values > start) & (values < end), grid[d]).sum(1))
    return 2*np.outer(*counts) >= box[view][2]*box[view][3]


def shared_by_truncating(box, flip, grid, view):
    "Rule 'floor' by loops: float32 fractions of the crop, mirrored, times the grid, truncated."
    one, edges = np.float32(1), []
    for d in (0, 1):
        start, length = box[view][d], box[view][d+2]
        low = max(box[0][d], box[1][d])
        high = min(box[0][d] + box[0][d+2], box[1][d] + box[1][d+2])
        low, high = np.float32((low - start)/length), np.float32((high - start)/length)
        if d == 1 and flip[view]:
            low, high = one - high, one - low
        edges.append((int(low*np.float32(grid[d])), int(high*np.float32(grid[d]))))
    mask = np.zeros(grid, bool)
    for y in range(*edges[0]):
        for x in range(*edges[1]):
            mask[y, x] = True
    return mask


SLOW = dict(area=shared_by_counting, floor=shared_by_truncating)


def mirror(grid):
    "Cell number of the left-right mirrored cell, (S,)."
    return np.arange(grid[0]*grid[1]).reshape(grid)[:, ::-1].ravel()


# Overlap

@pytest.mark.parametrize('rule', SLOW)
@moderate
@given(box=pairs(), flip=flips, grid=grids)
def test_overlap_equals_slow_count(rule, box, flip, grid):
    "Both rules, both views, any grid."
    mask = overlap(box, torch.tensor([flip]), grid, rule=rule)
    assert mask.shape == (1, 2, *grid) and mask.dtype == torch.bool
    for v in (0, 1):
        slow = SLOW[rule](box[0].tolist(), flip, grid, v)
        np.testing.assert_array_equal(mask[0, v], slow)


@pytest.mark.parametrize('rule', SLOW)
@moderate
@given(box=pairs(touching=False), flip=flips, grid=grids)
def test_disjoint_views_share_nothing(rule, box, flip, grid):
    "No cell is inside unless the crops share a pixel."
    if not shared_area(*box[0].tolist()):
        assert not overlap(box, torch.tensor([flip]), grid, rule=rule).any()


@pytest.mark.parametrize('rule', SLOW)
@few
@given(box=pairs(), flip=flips, n=st.integers(1, 7))
def test_overlap_symmetries(rule, box, flip, n):
    "Batched as alone, views swapped, int grid, float box, and a view against itself."
    flip = torch.tensor([flip])
    mask = overlap(box, flip, n, rule=rule)
    assert torch.equal(mask, overlap(box, flip, (n, n), rule=rule))
    assert torch.equal(mask, overlap(box.float(), flip, n, rule=rule))
    assert torch.equal(mask.flip(1), overlap(box.flip(1), flip.flip(1), n, rule=rule))
    boxes = torch.cat((box, box.flip(1), box[:, [0, 0]]))
    batch = overlap(boxes, torch.cat((flip, flip.flip(1), flip)), n, rule=rule)
    assert torch.equal(batch[:2], torch.cat((mask, mask.flip(1)))) and batch[2].all()


@few
@given(box=pairs(), flip=flips, grid=grids, offset=st.integers(0, 1000))
def test_area_rule_ignores_units_and_origin(box, flip, grid, offset):
    "Half-pixel boxes and shifted images give the same cells."
    flip = torch.tensor([flip])
    mask = overlap(box, flip, grid)
    assert torch.equal(mask, overlap(box/2, flip, grid))
    assert torch.equal(mask, overlap(box + torch.tensor([offset, 2*offset, 0, 0]), flip, grid))


def test_unknown_rule_is_refused():
    "A misspelt rule raises."
    box, flip = torch.tensor([[[0, 0, 4, 4]]*2]), torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError):
        overlap(box, flip, 2, rule='round')


# Spatial matching

@moderate
@given(box=pairs(touching=False), flip=flips, grid=grids)
def test_cell_centres_are_the_mean_of_their_sub_pixels(box, flip, grid):
    "Every cell of both views."
    ours = cell_centres(box, torch.tensor([flip]), grid)
    assert ours.shape == (1, 2, *grid, 2)
    for v in (0, 1):
        slow = centres(box[0, v].tolist(), flip[v], grid)/(2*np.array(grid))
        np.testing.assert_allclose(ours[0, v].reshape(-1, 2), slow, rtol=1e-6, atol=1e-5)


@moderate
@given(box=pairs(touching=False), flip=flips, grid=grids,
       max_dist=st.sampled_from((None, .1, .25, .5, .7, 1.)))
def test_match_coord_is_the_nearest_of_all_keys(box, flip, grid, max_dist):
    "Valid cells exactly, nearest keys up to exact ties, the distance limit up to rounding."
    index, valid = match_coord(box, torch.tensor([flip]), grid, max_dist)
    assert index.shape == valid.shape == (1, 2, grid[0]*grid[1])
    assert index.dtype == torch.int64 and valid.dtype == torch.bool
    assert ((index >= 0) & (index < grid[0]*grid[1])).all()
    box = box[0].tolist()
    for q in (0, 1):
        d = squared_distances(box, flip, grid, q)
        inside = contains(box[1-q], centres(box[q], flip[q], grid), grid)
        ours, kept = index[0, q].numpy(), valid[0, q].numpy()
        nearest = d.min(1)
        far, unsure = beyond(nearest, box, grid, max_dist)
        np.testing.assert_array_equal(kept[~unsure], (inside & ~far)[~unsure])
        np.testing.assert_array_equal(d[np.arange(len(d)), ours][kept], nearest[kept])


def beyond(nearest, box, grid, max_dist):
    "Which nearest centres are farther than the limit, and which are too close to it to tell."
    if max_dist is None:
        return np.zeros((2, len(nearest)), bool)
    h, w = grid
    diagonal = max(Fraction(height, h)**2 + Fraction(width, w)**2 for _, _, height, width in box)
    limit = float(diagonal*(2*h*w)**2)*max_dist**2
    return nearest > limit, np.isclose(nearest, limit, rtol=1e-6, atol=0)


@pytest.mark.parametrize('n', range(1, 15))
def test_centres_on_a_border(n):
    "Centres exactly on the key's border count at its top and left, not at its bottom and right."
    unit = torch.tensor([1, 3, 5]*n)
    start = unit*(2*torch.arange(n).repeat_interleave(3) + 1)
    query = torch.stack((0*unit, 0*unit, 2*n*unit, 2*n*unit), 1)
    low = torch.stack((start, start, unit, unit), 1)
    high = torch.stack((start-unit, start-unit, unit, unit), 1)
    for border in (low, high):
        box = torch.stack((query, border), 1)
        for flip in ((False, False), (True, False)):
            _, valid = match_coord(box, torch.tensor([flip]*len(box)), n)
            slow = [contains(key, centres(query, flip[0], (n, n)), (n, n))
                    for query, key in box.tolist()]
            np.testing.assert_array_equal(valid[:, 0], slow)


@few
@given(box=pairs(), grid=grids, flip=flips)
def test_a_view_matches_itself(box, grid, flip):
    "The same crop twice: every cell meets itself, or its mirror image if one view is flipped."
    index, valid = match_coord(box[:, [0, 0]], torch.tensor([flip]), grid)
    assert valid.all()
    expected = mirror(grid) if flip[0] != flip[1] else np.arange(grid[0]*grid[1])
    for q in (0, 1):
        np.testing.assert_array_equal(index[0, q], expected)


@moderate
@given(box=pairs(), flip=flips, grid=grids, k=st.integers(0, 1))
def test_flipping_a_view_mirrors_its_cells(box, flip, grid, k):
    "Its mask, validity and indices are mirrored, the other view's stay; matches up to exact ties."
    turned = tuple(f != (v == k) for v, f in enumerate(flip))
    before, after = torch.tensor([flip]), torch.tensor([turned])
    m = mirror(grid)
    old, new = overlap(box, before, grid)[0], overlap(box, after, grid)[0]
    assert torch.equal(new[k], old[k].flip(-1)) and torch.equal(new[1-k], old[1-k])
    (old, old_valid), (new, new_valid) = (match_coord(box, f, grid) for f in (before, after))
    assert torch.equal(new_valid[0, k], old_valid[0, k][m])
    assert torch.equal(new_valid[0, 1-k], old_valid[0, 1-k])
    for query, expected in ((k, old[0, k].numpy()[m]), (1-k, m[old[0, 1-k].numpy()])):
        d, cell = squared_distances(box[0].tolist(), turned, grid, query), np.arange(len(m))
        kept, found = new_valid[0, query].numpy(), new[0, query].numpy()
        np.testing.assert_array_equal(d[cell, found][kept], d[cell, expected][kept])


@few
@given(box=pairs(), flip=flips, grid=grids)
def test_match_coord_swaps_with_the_views(box, flip, grid):
    "Exchanging the views exchanges the directions, alone and in a batch."
    flip = torch.tensor([flip])
    once = match_coord(box, flip, grid)
    both = match_coord(torch.cat((box, box.flip(1))), torch.cat((flip, flip.flip(1))), grid)
    for a, b in zip(once, both):
        assert torch.equal(b, torch.cat((a, a.flip(1))))


# Boxes

@moderate
@given(seed=seeds, height=st.integers(1, 300), width=st.integers(1, 300), low=st.floats(.01, 1))
def test_boxes_stay_inside_and_overlap(seed, height, width, low):
    "Any image, panoramas included, and any scale."
    rng = np.random.default_rng(seed)
    assert inside_image(random_box(rng, height, width, scale=(low, 1.)), height, width)
    boxes = two_boxes(rng, height, width, scale=(low, 1.), ratio=(3/4, 4/3))
    assert boxes.shape == (2, 4) and boxes.dtype == np.int64
    assert all(inside_image(b, height, width) for b in boxes.tolist())
    first, second = boxes.tolist()
    assert shared_area(first, second) >= max(1, .01*second[2]*second[3])


def inside_image(box, height, width):
    "Whole numbers, at least one pixel, within the image."
    top, left, h, w = box
    whole = all(isinstance(n, int) for n in box)
    return whole and 0 <= top < top+h <= height and 0 <= left < left+w <= width


@few
@given(seed=seeds, least=st.floats(.01, 1))
def test_min_overlap_is_kept(seed, least):
    "A larger least overlap holds too."
    rng = np.random.default_rng(seed)
    boxes = two_boxes(rng, 90, 120, scale=(.08, 1.), ratio=(3/4, 4/3), min_overlap=least)
    assert shared_area(*boxes.tolist()) >= least*boxes[1, 2:].prod()


@moderate
@given(seed=seeds, height=st.integers(150, 180), width=st.integers(150, 180))
def test_boxes_have_the_asked_scale_and_ratio(seed, height, width):
    "Area and aspect lie in their ranges, to within rounding of the sides."
    rng = np.random.default_rng(seed)
    _, _, h, w = random_box(rng, height, width, scale=(.2, .6), ratio=(3/4, 4/3))
    assert .2*height*width <= (h+1)*(w+1) and (h-1)*(w-1) <= .6*height*width
    assert 3/4 <= (w+1)/(h-1) and (w-1)/(h+1) <= 4/3


def test_boxes_reach_every_border_and_size():
    "Over many draws boxes touch all four borders and cover small and large areas."
    rng = np.random.default_rng(0)
    top, left, h, w = np.array([random_box(rng, 60, 80) for _ in range(2000)]).T
    assert top.min() == left.min() == 0 and (top+h).max() == 60 and (left+w).max() == 80
    area = h*w/4800
    assert .07 < area.min() < .1 and area.max() > .9 and .4 < area.mean() < .6


# Views

class Ramps:
    "Images whose green and blue channels grow by a whole step with each row and column."

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def steps(self, i):
        "Grey levels for each row and column."
        return [255//(n-1) if n > 1 else 1 for n in self.sizes[i]]

    def __getitem__(self, i):
        (height, width), (a, b) = self.sizes[i], self.steps(i)
        y, x = torch.meshgrid(a*torch.arange(height), b*torch.arange(width), indexing='ij')
        return torch.stack((torch.zeros_like(y), y, x)).to(torch.uint8)


def ramp(start, length, flip, n):
    "Original position that each of n output pixels shows, and which don't feel the border."
    scale = length/n
    at = (np.arange(n) + .5)*scale - .5
    clear = (at - max(1, scale) >= -.5) & (at + max(1, scale) <= length - .5)
    at = start + at.clip(0, length-1)
    return (at[::-1], clear[::-1]) if flip else (at, clear)


def regress(line, length, step):
    "Start, length, mirrored and error bound of a crop along an axis, from the grey levels it shows."
    _, clear = ramp(0, length, False, len(line))
    o = np.arange(len(line))[clear] + .5
    if len(o) < 2:
        return None
    slope, base = np.polyfit(o, line[clear]/step, 1)
    far = base + slope*len(line)
    bound = .5/step*(1 + 3*len(line)/len(o)) + .1*length/len(line) + .05
    return min(base, far) + .5, abs(slope)*len(line), slope < 0, bound


def check_axis(line, start, length, flip, step):
    "One axis of a view shows what its box and flip say."
    at, clear = ramp(start, length, flip, len(line))
    clear = clear | (length <= len(line))
    error = (line - step*at)[clear]
    assert np.abs(error).max(initial=0) <= 1 + .1*step*max(1, length/len(line))
    assert not clear.any() or abs(error.mean()) <= .6
    found = regress(line, length, step)
    if found is None:
        return
    first, extent, mirrored, bound = found
    assert abs(first - start) <= bound and abs(extent - length) <= bound
    if extent > bound:
        assert mirrored == flip


def check_views(sample, steps, size):
    "Shapes, dtypes, and both axes of both views."
    view, box, flip = (torch.as_tensor(sample[k]) for k in ('view', 'box', 'flip'))
    assert view.shape == (2, 3, *size) and view.dtype == torch.uint8
    assert box.shape == (2, 4) and box.dtype == torch.int64
    assert flip.shape == (2,) and flip.dtype == torch.bool
    for v, b, f in zip(view.double().numpy(), box.tolist(), flip.tolist()):
        top, left, height, width = b
        assert not v[0].any()
        assert np.ptp(v[1], axis=1).max() <= 1 and np.ptp(v[2], axis=0).max() <= 1
        check_axis(v[1].mean(1), top, height, False, steps[0])
        check_axis(v[2].mean(0), left, width, f, steps[1])


SIDES = dict(photo=((20, 64), (20, 64)), panorama=((2, 12), (150, 255)), tower=((150, 255), (2, 12)))


@pytest.mark.parametrize('sides', SIDES.values(), ids=SIDES)
@few
@given(seed=seeds, data=st.data(), size=st.tuples(st.integers(16, 48), st.integers(16, 48)))
def test_views_show_what_their_boxes_say(sides, seed, data, size):
    "Crops of a coordinate ramp give their box and flip back."
    images = Ramps(tuple(data.draw(st.integers(*s)) for s in sides))
    views = TwoViews(images, size=size, seed=seed)
    for epoch in range(3):
        check_views(views[epoch, 0], images.steps(0), size)


def test_fallback_views_overlap():
    "A strip 40 times as wide as high has no admissible crop. Its views still overlap."
    images = Ramps((6, 240))
    views = TwoViews(images, size=(24, 32), seed=0)
    for epoch in range(100):
        sample = views[epoch, 0]
        first, second = torch.as_tensor(sample['box']).tolist()
        assert shared_area(first, second) >= max(1, .01*second[2]*second[3])
        check_views(sample, images.steps(0), (24, 32))


def equal(a, b):
    "Whether two samples agree in everything."
    if set(a) != set(b):
        return False
    return all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def draws(sample):
    "All numbers drawn for a sample."
    return *np.ravel(sample['box']), *np.ravel(sample['flip']), *np.ravel(sample['draw'])


@few
@given(seed=seeds, epoch=st.integers(0, 1000), i=st.integers(0, 3), noise=st.integers(0, 100))
def test_views_depend_on_seed_epoch_index_only(seed, epoch, i, noise):
    "Neither earlier calls nor the global generators change a sample, and it leaves them alone."
    images = Ramps(*[(30, 40)]*4)
    first = TwoViews(images, size=8, seed=seed)[epoch, i]
    np.random.seed(noise)
    torch.manual_seed(noise)
    later = TwoViews(images, size=8, seed=seed)
    later[epoch + 1, i], later[noise, 0]
    assert equal(first, later[epoch, i]) and first['index'] == i
    assert equal(later[i], later[0, i])
    drawn = np.random.random(), torch.rand(())
    np.random.seed(noise)
    torch.manual_seed(noise)
    assert drawn == (np.random.random(), torch.rand(()))


def test_views_differ_across_seed_epoch_and_index():
    "No two of 2 x 20 x 4 samples of the same picture share their draws."
    images = Ramps(*[(30, 40)]*4)
    views = [TwoViews(images, size=8, seed=s) for s in (0, 1)]
    samples = [v[e, i] for v in views for e in range(20) for i in range(4)]
    assert len({draws(s) for s in samples}) == len(samples)
    draw = torch.stack([torch.as_tensor(s['draw']) for s in samples])
    assert draw.ndim == 3 and draw.shape[1] == 2 and draw.is_floating_point()
    assert draw.min() >= 0 and draw.max() <= 1 and len(draw.unique()) > .99*draw.numel()


def test_flips_are_fair_and_independent():
    "All four pairs of flips come up about equally often."
    views = TwoViews(Ramps((30, 40)), size=8, seed=3)
    flip = torch.stack([torch.as_tensor(views[e, 0]['flip']) for e in range(600)]).long()
    counts = torch.bincount(2*flip[:, 0] + flip[:, 1], minlength=4)
    assert ((counts > 110) & (counts < 190)).all()


def test_size_may_be_one_number():
    "An int is a square."
    views = TwoViews(Ramps((30, 40), (20, 20)), size=12)
    assert len(views) == 2 and tuple(views[1]['view'].shape) == (2, 3, 12, 12)


# Queue

def unit(number):
    "A unit vector for each running number."
    angle = .05*torch.as_tensor(number, dtype=torch.float)
    return torch.stack((angle.cos(), angle.sin()), -1)


def check_ring(queue, ring, length, total):
    "The queue holds the ring's keys, oldest first from the pointer on, and gives them all."
    expected = torch.stack(list(ring)) if ring else torch.zeros(0, 2)
    assert queue.filled == len(ring) and queue.pointer == total % length
    oldest_first = queue.keys.roll(-int(queue.pointer), 0)[length-len(ring):]
    torch.testing.assert_close(oldest_first, expected)
    negatives = queue.negatives()
    assert negatives.shape == (len(ring), 2) and not negatives.requires_grad
    torch.testing.assert_close(negatives, queue.keys[:len(ring)])


@pytest.mark.parametrize('start', ['empty', 'random'])
@moderate
@given(length=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=5))
def test_queue_is_a_ring(start, length, batches):
    "Any batch sizes, also larger than the queue, against a deque."
    queue, total = Queue(length, 2, start=start), 0
    ring = deque(queue.keys.clone() if start == 'random' else (), maxlen=length)
    torch.testing.assert_close(queue.negatives().norm(dim=1), torch.ones(len(ring)))
    check_ring(queue, ring, length, total)
    for n in batches:
        keys = unit(torch.arange(total, total + n))
        queue.enqueue(keys)
        ring.extend(keys)
        total += n
        check_ring(queue, ring, length, total)


def test_queue_survives_a_checkpoint():
    "A reloaded queue goes on where it was."
    queue, copy = Queue(5, 2), Queue(5, 2)
    queue.enqueue(unit(torch.arange(7)))
    copy.load_state_dict(queue.state_dict())
    for q in (queue, copy):
        q.enqueue(unit(torch.arange(7, 9)))
    assert torch.equal(queue.keys, copy.keys) and queue.pointer == copy.pointer == 4


def test_an_empty_queue_costs_nothing():
    "Without negatives the loss and its gradient are 0."
    q = unit(torch.arange(3)).requires_grad_()
    loss = info_nce(q, unit(torch.arange(3, 6)), Queue(4, 2).negatives())
    gradient, = torch.autograd.grad(loss.sum(), q)
    assert torch.equal(loss.detach(), torch.zeros(3))
    assert torch.equal(gradient, torch.zeros(3, 2))
