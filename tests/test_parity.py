"""Every number recorded from the authors' released code, case by case.

golden/README.md says how each was made.
PIXCON_GOLDEN names another folder of the same schema to check instead.
"""
import json
import os
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from pixcon.loss import info_nce, info_nce_plain
from pixcon.matching import match_sim, overlap
from pixcon.model import PixCon
from pixcon.reweight import semantic_weights
from pixcon.training import ema_momentum, learning_rate

GOLDEN = Path(os.environ.get('PIXCON_GOLDEN') or Path(__file__).parent/'golden')
CASES = json.loads((GOLDEN/'index.json').read_text())['cases']
VALUE, GRADIENT = dict(rtol=1e-5, atol=1e-6), dict(rtol=1e-4, atol=1e-7)
TRACE, TRACE_VALUE = dict(rtol=1e-4, atol=3e-5), dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The numbers were recorded with one thread."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorded(dict):
    "Arrays of one case as tensors, remembering which were read."
    def __init__(self, case):
        with np.load(GOLDEN/case['file']) as arrays:
            super().__init__({k: torch.from_numpy(a) for k, a in arrays.items()})
        listed = {a['name']: a['shape'] for a in case['arrays']}
        assert listed == {k: list(a.shape) for k, a in self.items()}
        self.unread = set(self)

    def __getitem__(self, name):
        self.unread.discard(name)
        return super().__getitem__(name)

    def below(self, prefix):
        "(rest of the name, array) of all arrays whose name starts with prefix."
        return [(name[len(prefix):], self[name]) for name in self if name.startswith(prefix)]


def near(ours, recorded, name, rtol, atol):
    "Fails with the array's name unless |ours - recorded| <= atol + rtol*|recorded|."
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    np.testing.assert_allclose(ours, recorded, rtol=rtol, atol=atol, err_msg=name)


def same(ours, recorded, name):
    "Fails with the array's name unless all values are equal."
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(recorded), err_msg=name)


def check_masks(case, r):
    "A: both masks at both grid sizes, exactly."
    box = torch.stack((r['box1'], r['box2']), 1)
    flip = torch.stack((r['flip1'], r['flip2']), 1).bool()
    for grid in (7, 14):
        mask = overlap(box, flip, grid, rule='floor')
        assert mask.dtype == torch.bool
        for view in (1, 2):
            same(mask[:, view-1], r[f'mask{grid}_{view}'], f'mask{grid}_{view}')
    r.unread -= {'image_size', 'clip1', 'clip2', 'fp32_sensitive'}


def rescaled(sim, inside):
    "The released rule in float64, before the power: 0/0 stays NaN."
    sim, outside = np.asarray(sim, np.float64), ~np.asarray(inside)
    low = sim.min(1, keepdims=True)
    high = np.where(outside, sim, -np.inf).max(1, keepdims=True)
    with np.errstate(all='ignore'):
        return np.where(outside, (sim - low)/(high - low), 1.)


def check_weights(case, r):
    "B: matches, cosines, weights with and without the mask; 0 where the reference has NaN."
    index, sim = match_sim(r['q_feat'], r['k_feat'])
    inside = r['mask'].flatten(1).bool()
    if not case['reference_nan']:
        same(index, r['match_index'], 'match_index')
        near(sim, r['max_cosine'], 'max_cosine', **VALUE)
    for power in case['config']['power']:
        ours = semantic_weights(sim, inside, power)
        unmasked = semantic_weights(sim, None, power)
        assert ours.isfinite().all() and unmasked.isfinite().all()
        if case['reference_nan']:
            nan = np.zeros(inside.shape, bool)
            nan[tuple(np.transpose(case['nan_at_sample_pixel']))] = True
            expected, raw = np.where(nan, 0, rescaled(sim, inside))**power, sim**power
            assert nan.any() and (ours.numpy()[nan] == 0).all()
        else:
            expected, raw = r[f'weights_p{power}'], r[f'weights_nomask_p{power}']
        near(ours, expected, f'weights_p{power}', **VALUE)
        near(unmasked, raw, f'weights_nomask_p{power}', **VALUE)


def rows(x):
    "(N,D,S) to (N*S,D)."
    return x.transpose(1, 2).flatten(0, 1)


def check_dense_loss(case, r):
    "C: loss of each query cell, weighted and plain mean over the batch, and their gradients."
    tau, weights = case['config']['temperature'], r['weights'].flatten()
    for nce in (info_nce, info_nce_plain):
        name = nce.__name__
        q = r['q_grid'].clone().requires_grad_()
        each = nce(rows(q), rows(r['k_matched']), r['queue'].T, tau)
        near(each.detach(), r['per_pixel_loss'].flatten(), f'{name} per_pixel_loss', **VALUE)
        weighted = (weights*each).sum()/weights.sum()
        for kind, loss in dict(weighted=weighted, unweighted=each.mean()).items():
            near(loss.detach(), r[f'loss_{kind}'].squeeze(), f'{name} loss_{kind}', **VALUE)
            gradient, = torch.autograd.grad(loss, q, retain_graph=True)
            recorded = r[f'grad_q_grid_{kind}']
            near(gradient, recorded, f'{name} grad_q_grid_{kind}', **GRADIENT)


def check_image_loss(case, r):
    "D: image-level loss and its gradient."
    for nce in (info_nce, info_nce_plain):
        q = r['q'].clone().requires_grad_()
        loss = nce(q, r['k'], r['queue'].T, case['config']['temperature']).mean()
        near(loss.detach(), r['loss'].squeeze(), f'{nce.__name__} loss', **VALUE)
        gradient, = torch.autograd.grad(loss, q)
        near(gradient, r['grad_q'], f'{nce.__name__} grad_q', **GRADIENT)


LAYERS = dict(global_head=dict(fc1=2, bn=3, fc2=5),
              dense_head=dict(conv1=0, bn=1, conv2=3),
              global_predictor=dict(fc1=0, bn=1, fc2=3),
              dense_predictor=dict(fc1=0, bn=1, fc2=3))


def key(side, role):
    "Our state-dict key of a recorded role."
    part, layer, leaf = role.split('.')
    part = part.replace('image_', 'global_')
    owner = '' if part.endswith('predictor') else f'{side}.'
    number = LAYERS[part][layer] if part in LAYERS else layer
    return f"{owner}{part}.{number}.{leaf}"


def small_backbone(channels):
    "28x28 to 7x7."
    def block(c, d):
        return nn.Conv2d(c, d, 3, 2, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU()
    return nn.Sequential(*block(3, 8), *block(8, channels))


def build(c):
    "The model of a trace, before its numbers are loaded."
    return PixCon(small_backbone(c['backbone_channels']), matching='sim', reweight=c['sr'],
                  dense_weight=c['loss_lambda'], tau=c['temperature'], power=c['power'],
                  queue=c['queue_len'], queue_start='random', hidden=c['hidden'], dim=c['out_dim'])


def load_initial(model, r):
    "Puts the recorded start into every parameter, BN buffer and queue."
    state = {}
    for side in ('online', 'target'):
        state |= {key(side, role): a for role, a in r.below(f'init.{side}.')}
    for kind in ('image', 'dense'):
        queue, keys = f'{kind}_queue.', r[f'init.queue_{kind}'].T
        state[queue + 'keys'] = keys
        state[queue + 'pointer'] = r[f'init.queue_{kind}_ptr']
        state[queue + 'filled'] = torch.tensor(len(keys))
    shapes = {k: a.shape for k, a in model.state_dict().items()}
    assert set(state) == set(shapes)
    model.load_state_dict({k: a.reshape(shapes[k]) for k, a in state.items()})


def check_forward(step, loss, out, r, reweighted):
    "Losses, matches, cosines and weights of one step."
    losses = dict(loss_image=out['loss_image'], loss_dense=out['loss_dense'], loss_total=loss)
    for name, value in losses.items():
        near(value.detach(), r[name][step], f'step{step} {name}', **TRACE_VALUE)
    assert (out['weights'] is not None) == reweighted
    for v in (0, 1):
        def name(what):
            return f'step{step}.{what}_v{v+1}'
        same(out['index'][:, v], r[name('match_index')], name('match_index'))
        near(out['similarity'][:, v], r[name('max_cosine')], name('max_cosine'), **TRACE_VALUE)
        if reweighted:
            tolerance = TRACE if step else VALUE
            near(out['weights'][:, v], r[name('weights')], name('weights'), **tolerance)


def check_final(model, r):
    "Parameters, BN buffers and queues after the last step."
    state, parameters = model.state_dict(), dict(model.named_parameters())
    for side in ('online', 'target'):
        for role, recorded in r.below(f'final.{side}.'):
            name = key(side, role)
            ours = state[name].reshape(recorded.shape)
            if role.endswith('num_batches_tracked'):
                same(ours, recorded, f'final.{side}.{role}')
            else:
                tolerance = VALUE if side == 'target' and name in parameters else TRACE
                near(ours, recorded, f'final.{side}.{role}', **tolerance)
    for kind in ('image', 'dense'):
        name = f'final.queue_{kind}'
        near(state[f'{kind}_queue.keys'].T, r[name], name, **TRACE)
        same(state[f'{kind}_queue.pointer'], r[f'{name}_ptr'].squeeze(), f'{name}_ptr')


def check_trace(case, r):
    "E: the whole model through its SGD steps: forward, enqueue, backward, SGD, EMA."
    c = case['config']
    assert c['use_mask'], 'a trace without the mask has no counterpart in pixcon.model'
    model = build(c).train()
    load_initial(model, r)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {key('online', role) for role, _ in r.below('step0.grad.')}
    optimizer = torch.optim.SGD(trained.values(), lr=c['lr'], momentum=c['sgd_momentum'],
                                weight_decay=c['weight_decay'])
    box = torch.tensor([0, 0, 28, 28]).expand(c['batch'], 2, 4)
    flip = torch.zeros(c['batch'], 2, dtype=torch.bool)
    for step, view in enumerate(r['enqueued_view'].tolist()):
        m = ema_momentum(step, c['total_steps'], c['base_momentum'], c['end_momentum'])
        near(m, r['momentum'][step], f'step{step} momentum', rtol=1e-12, atol=0)
        images = torch.stack([r[f'step{step}.view{v}'] for v in (1, 2)], 1)
        inside = torch.stack([r[f'step{step}.mask{v}'] for v in (1, 2)], 1)
        loss, out = model(images, box, flip, inside=inside.bool())
        check_forward(step, loss, out, r, c['sr'])
        model.enqueue(out, view - 1)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for role, recorded in r.below('step0.grad.'):
                near(trained[key('online', role)].grad, recorded, role, **TRACE)
        optimizer.step()
        model.update_target(m)
    check_final(model, r)


def schedule(s):
    "Our values of one recorded schedule."
    if s['array'].startswith('target_momentum'):
        return [ema_momentum(k, s['K'], s['base'], s['end']) for k in range(s['K'])]
    assert s['array'].startswith('learning_rate') and s['min_lr'] == 0, f"unknown schedule {s}"
    n = s['iters_per_epoch']
    rest = n, s['epochs'], s['base_lr'], s['warmup_epochs'], s['warmup_ratio']
    return [learning_rate(i, *rest) for i in range(n*s['epochs'])]


def check_schedules(case, r):
    "F: EMA momentum and learning rate."
    for s in case['schedules']:
        near(schedule(s), r[s['array']], s['array'], rtol=1e-12, atol=0)


CHECKS = dict(A=check_masks, B=check_weights, C=check_dense_loss, D=check_image_loss,
              E=check_trace, F=check_schedules)


def test_every_file_is_a_known_case():
    "No case is left out: the index lists every file, and every group has a check."
    assert CASES and {c['group'] for c in CASES} <= set(CHECKS)
    assert sorted(c['file'] for c in CASES) == sorted(p.name for p in GOLDEN.glob('*.npz'))


@pytest.mark.parametrize('case', CASES, ids=lambda c: c['id'])
def test_case(case):
    "All recorded arrays of one case are checked or used as input."
    assert case['group'] in CHECKS, f"no check for group {case['group']}"
    assert case['group'] == 'B' or not case['reference_nan']
    recorded = Recorded(case)
    CHECKS[case['group']](case, recorded)
    assert not recorded.unread
