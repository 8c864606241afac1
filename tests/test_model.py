"""What must hold of a training step whatever the numbers are: who gets gradients, where keys come from, what the queues receive."""
import copy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from pixcon.model import PixCon
from pixcon.training import Run, configure, enqueued_view

VARIANTS = dict(moco=dict(dense_weight=0.), coord=dict(matching='coord'), sim=dict(reweight=False), sr=dict())


def backbone():
    "A small network without batch statistics: 32 pixels -> 4 x 4 cells."
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 12, 2, 2))


@pytest.fixture
def batch():
    "Six pairs of views with overlapping boxes."
    g = torch.Generator().manual_seed(0)
    start = torch.randint(0, 20, (6, 2, 2), generator=g)
    box = torch.cat([start, torch.randint(30, 60, (6, 2, 2), generator=g)], -1)
    return torch.randn(6, 2, 3, 32, 32, generator=g), box, torch.rand(6, 2, generator=g) < .5


def make(**kwargs):
    torch.manual_seed(0)
    return PixCon(backbone(), hidden=16, dim=8, queue=32, queue_start='random', size=32, **kwargs)


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradient_reaches_the_online_side_only(variant, batch):
    "Every online parameter takes part, no parameter of the target does."
    model = make(**VARIANTS[variant])
    model(*batch)[0].backward()
    assert all(p.grad is None for p in model.target.parameters())
    dense = ('online.dense_head', 'dense_predictor')
    for n, p in model.named_parameters():
        if not n.startswith('target') and not (variant == 'moco' and n.startswith(dense)) and p.ndim > 1: assert p.grad.abs().max() > 0, n


@pytest.mark.parametrize('part', ['backbone', 'global_head', 'dense_head'])
def test_keys_depend_on_the_target_only(part, batch):
    "Disturb the online encoder: same keys. Disturb the target: other keys."
    model = make()
    before = model(*batch)[1]
    def disturb(module):
        for p in module.parameters(): p.data.add_(.3*torch.randn_like(p))
    disturb(getattr(model.online, part)); disturb(model.global_predictor); disturb(model.dense_predictor)
    after = model(*batch)[1]
    for k in ('image_keys', 'dense_keys'): assert torch.equal(before[k], after[k])
    disturb(getattr(model.target, part))
    after = model(*batch)[1]
    changed = {k: not torch.equal(before[k], after[k]) for k in ('image_keys', 'dense_keys')}
    assert changed == dict(image_keys=part != 'dense_head', dense_keys=part != 'global_head')


def test_matching_carries_no_gradient(batch):
    "Weights and similarities are constants; the query's gradient comes from the loss alone."
    model = make()
    out = model(*batch)[1]
    for k in ('index', 'similarity', 'inside', 'weights', 'image_keys', 'dense_keys', 'positive'): assert not out[k].requires_grad


def test_queues_receive_what_the_method_says(batch):
    "Image queue: the target's image embeddings. Dense queue: the normalised spatial mean of its dense output. One view, both queues."
    model = make()
    view = batch[0]
    loss, out = model(*batch)
    with torch.no_grad(): f = [model.target.backbone(view[:, v]) for v in (0, 1)]
    for v in (0, 1):
        image, dense = F.normalize(model.target.global_head(f[v]), dim=1), F.normalize(model.target.dense_head(f[v]).mean((2, 3)), dim=1)
        torch.testing.assert_close(out['image_keys'][:, v], image)
        torch.testing.assert_close(out['dense_keys'][:, v], dense)
    model.enqueue(out, 1)
    torch.testing.assert_close(model.image_queue.keys[:6], out['image_keys'][:, 1])
    torch.testing.assert_close(model.dense_queue.keys[:6], out['dense_keys'][:, 1])
    assert model.image_queue.pointer == model.dense_queue.pointer == 6


def test_directions_are_summed_and_weighted(batch):
    "Total = (1-lambda) image + lambda dense; lambda moves weight from one to the other."
    parts = {}
    for w in (0., .3, 1.): parts[w] = make(dense_weight=w)(*batch)
    image, dense = parts[0.][0], parts[1.][0]
    torch.testing.assert_close(parts[.3][0], .7*image + .3*dense)
    assert parts[0.][1]['loss_dense'] == 0 and parts[1.][1]['loss_image'] == 0


def test_coord_leaves_unmatched_cells_out(batch):
    "A query cell without a counterpart has weight 0, and no shared cell at all gives a loss of 0, not NaN."
    view, _, flip = batch
    model = make(matching='coord', dense_weight=1.)
    apart = torch.tensor([[[0, 0, 20, 20], [50, 50, 20, 20]]]).expand(6, -1, -1)
    loss, out = model(view, apart, flip)
    assert out['weights'].sum() == 0 and loss == 0


def test_target_follows_by_moving_average(batch):
    "target <- m target + (1-m) online for parameters; buffers are its own."
    torch.manual_seed(0)
    model = PixCon(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8)), hidden=16, dim=8, queue=32, size=32)
    for p in model.online.parameters(): p.data.add_(1.)
    before = copy.deepcopy(model.target.state_dict())
    model.update_target(.9)
    for (n, p), online in zip(model.target.named_parameters(), model.online.parameters()): torch.testing.assert_close(p, .9*before[n] + .1*online)
    for n, b in model.target.named_buffers(): assert torch.equal(b, before[n])


@pytest.mark.parametrize('variant', VARIANTS)
def test_learns(variant, tmp_path):
    "A few steps on a few scenes bring the loss well below that of indifferent embeddings."
    run = Run(*configure(data='scenes', scenes=16, batch=8, epochs=20, size=32, hidden=32, dim=16, queue=32, out=tmp_path, **VARIANTS[variant]))
    log = run.fit()
    assert log[-1]['loss'] < .93*log[-1]['loss_chance']


def test_enqueued_view_is_a_function_of_seed_and_step():
    "The same on every process, and both views get their turn."
    drawn = [enqueued_view(3, k) for k in range(200)]
    assert drawn == [enqueued_view(3, k) for k in range(200)] and 60 < sum(drawn) < 140
