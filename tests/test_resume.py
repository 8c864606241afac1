"""A run that was cut off and started again is the run that was not."""
import json
import os
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from pixcon.run import load_optimizer, read_lines, read_log
from pixcon.training import Pretraining, configure

TINY = dict(data='scenes', scenes=20, batch=4, epochs=3, size=32, hidden=16, dim=8, queue=12,
            log_steps=1, amp='off')
TIMES = {'images_per_s', 'seconds', 'data_wait'}


def make(out, **given):
    "A run that has not begun."
    return Pretraining(*configure(**{**TINY, **given}, out=out))


def run_whole(out, **given):
    "Trains to the end."
    training = make(out, **given)
    return training, training.fit()


def cut(out, save_at, stop_at, **given):
    "Trains, saves after one step and is lost after another."
    training = make(out, **given)
    training.begin()
    for parts in training.steps():
        training.run.report(training.log_line(training.train_step(parts)))
        if training.run.step == save_at: training.run.save()
        if training.run.step == stop_at: return


def timeless(log): return [{k: v for k, v in line.items() if k not in TIMES} for line in log]


def assert_same_state(a, b):
    "Weights, queues and buffers are the same bits."
    theirs = b.state_dict()
    for n, t in a.state_dict().items(): assert torch.equal(t, theirs[n]), n


@pytest.mark.parametrize('amp', ['off', 'bf16'])
@pytest.mark.parametrize('save_at,stop_at,given', [
    (1, 1, {}), (4, 9, {}), (10, 11, {}), (7, 8, dict(optimizer='sgd', lr=.05, matching='coord')),
    (6, 11, dict(dense_start=.6)), (11, 12, dict(dense_start=.6))])
def test_continues_bit_for_bit(tmp_path, save_at, stop_at, given, amp):
    """Weights, queues and logged losses are equal, mid-epoch and at an epoch's end.

    No bound is needed in either number format: the same operations run on the same numbers."""
    whole, log = run_whole(tmp_path/'whole', amp=amp, **given)
    cut(tmp_path/'cut', save_at, stop_at, amp=amp, **given)
    again, log_again = run_whole(tmp_path/'cut', amp=amp, **given)
    assert_same_state(again.model, whole.model)
    assert timeless(log) == timeless(log_again)


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_dense_loss_begins_later(tmp_path, optimizer):
    """Up to its start the dense heads rest, weight decay included, and all else is as in MoCo-v2+; then they learn.

    The dense queue is filled from the first step on."""
    def dense(training):
        "Parameters that only the dense loss moves."
        own = 'online.dense_head', 'dense_predictor'
        return {n: p.detach().clone() for n, p in training.model.named_parameters() if n.startswith(own)}
    given = dict(optimizer=optimizer, weight_decay=.1)
    late, moco = make(tmp_path/'late', dense_start=.4, **given), make(tmp_path/'moco', dense_weight=0., **given)
    begun, losses = dense(late), []
    for parts in late.steps():
        out = late.train_step(parts)
        losses.append(out['loss_dense'].item())
        if late.run.step <= 6:
            moco.train_step(parts)
            for n, p in dense(late).items(): assert torch.equal(p, begun[n]), n
            for n, p in late.model.online.backbone.state_dict().items():
                assert torch.equal(p, moco.model.online.backbone.state_dict()[n]), n
        if late.run.step == 3: assert late.model.dense_queue.filled == 12
        if late.run.step == 6: assert not torch.equal(late.model.dense_queue.keys, late.model.image_queue.keys)
    assert [loss > 0 for loss in losses] == [False]*6 + [True]*9    # 0.4 of 15 steps
    moved = [n for n, p in dense(late).items() if not torch.equal(p, begun[n])]
    assert len(moved) == len(begun)


def test_a_parameter_that_came_later(tmp_path):
    "A checkpoint from before dense_start was there goes on as with 0, and is refused for anything else."
    cut(tmp_path, 4, 4, dense_start=0.)
    state = torch.load(tmp_path/'checkpoint.pt', weights_only=True)
    del state['config']['dense_start']
    torch.save(state, tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='dense_start 0.0, now 0.3'): make(tmp_path, dense_start=.3).begin()
    training = make(tmp_path, dense_start=0.)
    training.begin()
    assert training.run.step == 4


def strides(t):
    "Of the axes longer than one: the others have no meaning."
    return [s for s, n in zip(t.stride(), t.shape) if n > 1]


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_another_precision(tmp_path, optimizer):
    "off -> bf16 -> off: momentum keeps its values, lies as its parameter does, and the next step uses it rightly."
    given = dict(optimizer=optimizer, lr=.01, backbone='resnet18', stride=8, queue_start='random')
    cut(tmp_path/'run', 2, 2, amp='off', **given)
    for stop, amp in ((4, 'bf16'), (6, 'off')):
        saved = torch.load(tmp_path/'run'/'checkpoint.pt', weights_only=True)['optimizer']['state']
        again = make(tmp_path/'run', amp=amp, **given)
        again.begin()
        state = list(again.optimizer.state.items())
        for (p, values), theirs in zip(state, saved.values()):
            for n, v in values.items():
                assert torch.equal(v, theirs[n]), n
                if n != 'step': assert strides(v) == strides(p)
        for parts in again.steps():
            again.run.report(again.log_line(again.train_step(parts)))
            if again.run.step == stop: break
        again.run.save()
    log = read_log(tmp_path/'run')
    assert [line['step'] for line in log] == list(range(1, 7)) and not log[-1]['skipped']


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_fused_step_after_another_layout(name):
    "A channels-last parameter with a momentum saved contiguous moves as in a run that was always channels last."
    from pixcon.run import make_optimizer
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(3))
    def steps(layouts):
        state = None
        value = start
        for layout, g in zip(layouts, gradients):
            p = torch.nn.Parameter(value.clone().to(memory_format=layout))
            optimizer = make_optimizer(name, [p], .1, 1e-2)
            if state: load_optimizer(optimizer, state)
            p.grad = g.clone().to(memory_format=layout)
            optimizer.step()
            state, value = optimizer.state_dict(), p.detach()
        return value
    last = torch.channels_last
    torch.testing.assert_close(steps([torch.contiguous_format, last]), steps([last, last]), rtol=1e-6, atol=1e-7)


def test_dropout_is_a_function_of_the_step(tmp_path):
    "A backbone with stochastic depth continues exactly, too."
    given = dict(backbone='efficientnet_b0', stride=8, epochs=1)
    whole, _ = run_whole(tmp_path/'whole', **given)
    cut(tmp_path/'cut', 2, 3, **given)
    again, _ = run_whole(tmp_path/'cut', **given)
    assert_same_state(again.model, whole.model)


def test_finished_run_stays_as_it_is(tmp_path):
    "The same command on a finished run trains nothing."
    first, log = run_whole(tmp_path)
    second, again = run_whole(tmp_path)
    assert log == again and second.run.step == first.run.step


def test_longer_run_goes_on(tmp_path):
    "More epochs continue from the end of the shorter run."
    run_whole(tmp_path, epochs=2)
    _, log = run_whole(tmp_path, epochs=4)
    assert [line['step'] for line in log] == list(range(1, 21))


def test_refuses_another_run(tmp_path):
    "Parameters that change what is computed must be those of the checkpoint."
    run_whole(tmp_path, epochs=1)
    with pytest.raises(ValueError, match='tau 0.2, now 0.3'): run_whole(tmp_path, epochs=1, tau=.3)


def test_refuses_other_images(tmp_path):
    "The same number of files under other names is another data set, the same files elsewhere are not."
    for folder, name in (('a', 'photo'), ('b', 'photo'), ('c', 'other')):
        (tmp_path/folder).mkdir()
        for i in range(4): Image.effect_noise((40, 40), 50 + i).save(tmp_path/folder/f'{name}{i}.png')
    given = dict(recipe='small', epochs=1)
    run_whole(tmp_path/'run', **given, data=tmp_path/'a')
    run_whole(tmp_path/'run', **given, data=tmp_path/'b')
    with pytest.raises(ValueError, match='images'): run_whole(tmp_path/'run', **given, data=tmp_path/'c')


def test_refuses_the_first_edition(tmp_path):
    "A checkpoint of version 0.1 is told by name, and is neither set aside nor written over."
    torch.save(dict(config=dict(twin_start=.99), step=4, model={}), tmp_path/'checkpoint.pt')
    before = (tmp_path/'checkpoint.pt').read_bytes()
    with pytest.raises(ValueError, match='first edition of pixcon'): run_whole(tmp_path)
    assert (tmp_path/'checkpoint.pt').read_bytes() == before


def test_line_cut_off(tmp_path):
    "A log whose last line is half is read up to there, a run with no checkpoint starts a new log."
    (tmp_path/'log.jsonl').write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [{'step': 1}]
    _, log = run_whole(tmp_path, epochs=1)
    assert [line['step'] for line in log] == list(range(1, 6))


def test_ten_bad_steps_in_a_row_stop(tmp_path):
    "The run stops and says so, the skipped steps are counted with their images, and what was saved before stays."
    training = make(tmp_path, queue_start='random')
    training.begin()
    training.run.save()
    training.photometric = lambda view, draw: torch.full(view.shape, torch.nan)
    online = {n: p for n, p in training.model.named_parameters() if not n.startswith('target')}
    weights = {n: p.clone() for n, p in online.items()}
    message = '10 steps in a row, up to step 10, were not finite'
    with pytest.raises(FloatingPointError, match=message): training.fit()
    for n, p in online.items(): assert torch.equal(p, weights[n]), n
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 0
    noted = read_lines(tmp_path/'skipped.jsonl')
    assert [line['step'] for line in noted] == list(range(1, 11))
    assert all(len(line['images']) == 4 for line in noted)


def test_an_end_of_bad_steps_is_an_error(tmp_path):
    "A run too short for ten of them writes no weights when its last three were such; with two it ends well."
    for last, well in ((3, False), (2, True)):
        training = make(tmp_path/str(last), epochs=1)
        usual = training.photometric
        def photometric(view, draw):
            bad = training.run.step >= training.run.total - last
            return torch.full(view.shape, torch.nan) if bad else usual(view, draw)
        training.photometric = photometric
        if well: training.fit()
        else:
            with pytest.raises(FloatingPointError, match='3 steps in a row, up to step 5, were not finite'): training.fit()
        assert (tmp_path/str(last)/'backbone.safetensors').exists() == well


def test_weights_can_be_read_by_others(tmp_path):
    "With the same permissions as the rest of the run's folder."
    old = os.umask(0o022)
    try: run_whole(tmp_path, epochs=1)
    finally: os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob('*') if path.is_file()} == {'0o644'}


def test_folder_holds_what_the_run_was(tmp_path):
    "config.json whole, log.jsonl with the promised columns, weights under torchvision's names."
    run_whole(tmp_path, epochs=1)
    config = json.loads((tmp_path/'config.json').read_text())
    assert config['scenes'] == 20 and config['recipe'] == 'small'
    columns = {'step', 'loss', 'loss_image', 'loss_dense', 'loss_uninformed', 'lr', 'momentum', *TIMES}
    for line in read_log(tmp_path): assert columns <= set(line)
    health = {'positive', 'matched_inside', 'weighted', 'spread', 'rank', 'queue_fill'}
    assert health <= set(read_log(tmp_path)[-1])
    keys = set(torchvision.models.get_model(config['backbone']).state_dict())
    assert set(load_file(tmp_path/'backbone.safetensors')) <= keys
