"""What must hold of a training step whatever the numbers are.

Who gets gradients, where keys come from, what the queues receive, what the loss is held against.
"""
import copy
import math
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from pixcon import loss as losses
from pixcon.loss import default_queue, own_key_fraction, uninformed_loss
from pixcon.model import PixCon
from pixcon.training import Pretraining, configure, enqueued_view

VARIANTS = dict(moco=dict(dense_weight=0.), coord=dict(matching='coord'),
                sim=dict(reweight=False), sr=dict())


def backbone():
    "A small network without batch statistics: 32 pixels -> 4 x 4 cells."
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 12, 2, 2))


@pytest.fixture
def batch():
    "Six pairs of views with overlapping boxes."
    g = torch.Generator().manual_seed(0)
    start = torch.randint(0, 20, (6, 2, 2), generator=g)
    box = torch.cat([start, torch.randint(30, 60, (6, 2, 2), generator=g)], -1)
    view = torch.randn(6, 2, 3, 32, 32, generator=g)
    return view, box, torch.rand(6, 2, generator=g) < .5


def make(**kwargs):
    torch.manual_seed(0)
    return PixCon(backbone(), hidden=16, dim=8, queue=32, queue_start='random', size=32, **kwargs)


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradient_reaches_the_online_side_only(variant, batch):
    "Every online parameter takes part, no parameter of the target encoder does."
    model = make(**VARIANTS[variant])
    model(*batch)[0].backward()
    assert all(p.grad is None for p in model.target.parameters())
    unused = ('target',)
    if variant == 'moco':
        unused += ('online.dense_head', 'dense_predictor')
    for n, p in model.named_parameters():
        if not n.startswith(unused) and p.ndim > 1:
            assert p.grad.abs().max() > 0, n


def disturb(*modules):
    "Adds noise to all parameters."
    for module in modules:
        for p in module.parameters():
            p.data.add_(.3*torch.randn_like(p))


@pytest.mark.parametrize('part', ['backbone', 'global_head', 'dense_head'])
def test_keys_depend_on_the_target_encoder_only(part, batch):
    "Disturb the online encoder: same keys. Disturb the target encoder: other keys."
    model = make()
    before = model(*batch)[1]
    disturb(getattr(model.online, part), model.global_predictor, model.dense_predictor)
    after = model(*batch)[1]
    for k in ('image_keys', 'dense_keys'):
        assert torch.equal(before[k], after[k])
    disturb(getattr(model.target, part))
    after = model(*batch)[1]
    changed = {k: not torch.equal(before[k], after[k]) for k in ('image_keys', 'dense_keys')}
    assert changed == dict(image_keys=part != 'dense_head', dense_keys=part != 'global_head')


def test_matching_carries_no_gradient(batch):
    "Weights and similarities are constants; the query's gradient comes from the loss alone."
    out = make()(*batch)[1]
    for k in ('index', 'similarity', 'inside', 'weights', 'image_keys', 'dense_keys', 'positive'):
        assert not out[k].requires_grad


def test_queues_receive_what_the_method_says(batch):
    """Image queue: the target encoder's global embeddings. Dense queue: the normalised spatial
    mean of its dense output. One view, both queues."""
    model = make()
    out = model(*batch)[1]
    for v in (0, 1):
        with torch.no_grad():
            f = model.target.backbone(batch[0][:, v])
            image = F.normalize(model.target.global_head(f), dim=1)
            dense = F.normalize(model.target.dense_head(f).mean((2, 3)), dim=1)
        torch.testing.assert_close(out['image_keys'][:, v], image)
        torch.testing.assert_close(out['dense_keys'][:, v], dense)
    model.enqueue(out, 1)
    torch.testing.assert_close(model.image_queue.keys[:6], out['image_keys'][:, 1])
    torch.testing.assert_close(model.dense_queue.keys[:6], out['dense_keys'][:, 1])
    assert model.image_queue.pointer == model.dense_queue.pointer == 6


def test_directions_are_summed_and_weighted(batch):
    "Total = (1-lambda) image + lambda dense; lambda moves weight from one to the other."
    parts = {w: make(dense_weight=w)(*batch) for w in (0., .3, 1.)}
    image, dense = parts[0.][0], parts[1.][0]
    torch.testing.assert_close(parts[.3][0], .7*image + .3*dense)
    assert parts[0.][1]['loss_dense'] == 0 and parts[1.][1]['loss_image'] == 0


def test_coord_leaves_unmatched_cells_out(batch):
    "A query cell without a counterpart has weight 0, no shared cell gives a loss of 0, not NaN."
    view, _, flip = batch
    model = make(matching='coord', dense_weight=1.)
    apart = torch.tensor([[[0, 0, 20, 20], [50, 50, 20, 20]]]).expand(6, -1, -1)
    loss, out = model(view, apart, flip)
    assert out['weights'].sum() == 0 and loss == 0


def test_target_encoder_follows_by_moving_average(batch):
    "target <- m target + (1-m) online for parameters; buffers are its own."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8))
    model = PixCon(net, hidden=16, dim=8, queue=32, size=32)
    for p in model.online.parameters():
        p.data.add_(1.)
    before = copy.deepcopy(model.target.state_dict())
    model.update_target(.9)
    online = dict(model.online.named_parameters())
    for n, p in model.target.named_parameters():
        torch.testing.assert_close(p, .9*before[n] + .1*online[n])
    for n, b in model.target.named_buffers():
        assert torch.equal(b, before[n])


@pytest.mark.parametrize('variant', VARIANTS)
def test_learns(variant, tmp_path):
    "A few steps on a few scenes bring the loss well below that of collapsed embeddings."
    run = Pretraining(*configure(data='scenes', scenes=16, batch=8, epochs=20, size=32, hidden=32,
                                 dim=16, queue=32, out=tmp_path, **VARIANTS[variant]))
    log = run.fit()
    assert log[-1]['loss'] < .93*2*math.log(32 + 1)


def test_enqueued_view_is_a_function_of_seed_and_step():
    "The same on every process, and both views get their turn."
    drawn = [enqueued_view(3, k) for k in range(200)]
    assert drawn == [enqueued_view(3, k) for k in range(200)] and 60 < sum(drawn) < 140


# The loss of the uninformed

@pytest.mark.parametrize('n', [1, 2, 10, 300])
@pytest.mark.parametrize('dim', [2, 3, 16, 128])
@pytest.mark.parametrize('tau', [.07, .2, 1.])
def test_uninformed_loss_is_what_random_embeddings_pay(n, dim, tau):
    "To 1 %, or to what the simulation can tell; never less than collapsed ones pay."
    torch.manual_seed(0)
    found = []
    for _ in range(10):
        q = F.normalize(torch.randn(200, 1, dim, dtype=torch.double), dim=2)
        keys = F.normalize(torch.randn(200, n+1, dim, dtype=torch.double), dim=2)
        cosine = (q*keys).sum(2)                                   # (200,n+1)
        found.append((cosine/tau).logsumexp(1) - cosine[:, 0]/tau)
    found = torch.cat(found)
    error = found.std().item()/len(found)**.5
    value = uninformed_loss(n, dim, tau)
    assert abs(value - found.mean().item()) < max(.01*value, 4*error)
    assert value > math.log(n + 1)


@pytest.mark.parametrize('tau', [.01, .05, .2, 1., 10.])
def test_uninformed_loss_with_one_negative_and_three_dimensions(tau):
    "The cosine is then uniform: log(e^a + e^b) integrated over the square."
    c = (torch.arange(1200, dtype=torch.double) + .5)/600 - 1
    exact = torch.logaddexp(c[:, None]/tau, c/tau).mean().item()
    assert uninformed_loss(1, 3, tau) == pytest.approx(exact, rel=1e-4)


def test_uninformed_loss_grows_with_the_queue_and_is_finite():
    "From 0 without negatives, for any temperature and dimension."
    for dim, tau in ((2, .01), (128, .01), (128, .2), (2048, .07), (8, 100.)):
        row = [uninformed_loss(n, dim, tau) for n in (0, 1, 2, 5, 100, 65536)]
        assert row[0] == 0 and row == sorted(row) and math.isfinite(row[-1])
    for bad in ((-1, 8, .2), (4, 1, .2), (4, 8, 0)):
        with pytest.raises(ValueError, match='at least'):
            uninformed_loss(*bad)


# The queue and the data

def looked_up(length, images, batch, epochs=60):
    "Fraction of the queries after the first epoch whose last key is among the latest ones."
    g = torch.Generator().manual_seed(0)
    last, found = {}, []
    for epoch in range(epochs):
        order = torch.randperm(images, generator=g).tolist()
        for at, image in enumerate(order):
            written = (epoch*images + at)//batch*batch             # keys before this step
            if epoch:
                found.append(written - last[image] <= length)
            last[image] = epoch*images + at
    return sum(found)/len(found)


@pytest.mark.parametrize('epochs', [.1, .25, .5, .8, 1., 1.3, 1.7, 2., 3.])
def test_own_key_fraction_by_looking(epochs):
    "Queues shorter and longer than the data; a step of one image, to what 60 epochs can tell."
    length = int(epochs*500)
    assert looked_up(length, 500, 1) == pytest.approx(own_key_fraction(length, 500), abs=.01)


def test_default_queue():
    "A power of two, at most a quarter of the data, at least a batch, at most the paper's."
    for images in (1, 5, 100, 256, 4096, 118287, 10**7):
        for batch in (1, 8, 512):
            length = default_queue(images, batch)
            assert length >= batch
            if length > batch:
                assert 4*length <= images and length & (length - 1) == 0 and length <= 65536
                assert length == 65536 or 8*length > images
    assert default_queue(10**7, 8, most=1024) == 1024
    with pytest.raises(ValueError):
        own_key_fraction(8, 0)


# The choice of an attention kernel

def right(q, k, scale): # (1,1,M,D), (1,1,K,D)
    "What every CPU can compute, in the shapes of an attention kernel."
    lse, mean = losses._chunked(q[0, 0], k[0, 0], scale)
    return mean[None, None].to(q.dtype), lse[None, None]


WRONG = dict(zeros=lambda mean, k: 0*mean, twice=lambda mean, k: 2*mean,
             half=lambda mean, k: mean/2, rows=lambda mean, k: mean.roll(1, 2),
             unweighted=lambda mean, k: k.mean(2, keepdim=True).expand_as(mean),
             nan=lambda mean, k: mean*torch.nan)


@pytest.mark.parametrize('dtype', [torch.float, torch.bfloat16], ids=str)
@pytest.mark.parametrize('dim', [8, 128, 512])
@pytest.mark.parametrize('wrong', WRONG)
def test_a_wrong_kernel_is_refused(monkeypatch, wrong, dim, dtype):
    "Whatever it gets wrong about the weighted mean, in both formats; the right one is taken."
    def kernel(q, k, scale):
        mean, lse = right(q, k, scale)
        return WRONG[wrong](mean, k), lse
    monkeypatch.setitem(losses._kernels, 'cpu', [kernel, right])
    assert losses._kernel.__wrapped__('cpu', dtype, dim) is right


@pytest.mark.parametrize('dtype', [torch.float, torch.bfloat16], ids=str)
def test_a_wrong_scale_or_sum_is_refused(monkeypatch, dtype):
    "A kernel that ignores the scale, or returns another log-sum-exp, or none at all."
    def unscaled(q, k, scale):
        return right(q, k, q.shape[-1]**-.5)
    def base_two(q, k, scale):
        mean, lse = right(q, k, scale)
        return mean, lse/math.log(2)
    def missing(q, k, scale):
        raise NotImplementedError
    monkeypatch.setitem(losses._kernels, 'cpu', [unscaled, base_two, missing])
    assert losses._kernel.__wrapped__('cpu', dtype, 128) is None
