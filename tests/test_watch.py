"""Watching a run: the board, the words, the picture in a notebook, TensorBoard and W&B."""
import json
import math
import sys
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from pixcon import run as run_module
from pixcon.run import LIMITS, find_trackers, read_log, verdict
from pixcon.training import Pretraining, configure, read_boards
from pixcon.watch import animate, main, moments_of, say, show_strip
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = dict(data='scenes', scenes=20, batch=4, epochs=3, size=32, hidden=16, dim=8, queue=12,
            log_steps=1, amp='off', workers=0, board_epochs=1)
TIMES = {'images_per_s', 'seconds', 'data_wait'}


def make(out, **given): return Pretraining(*configure(**{**TINY, **given}, out=out))


def lost(out, save_at, stop_at, **given):
    "Trains as `fit` does, saves after one step and is lost after another."
    training = make(out, **given)
    training.begin()
    for parts in training.steps():
        out = training.train_step(parts)
        training.keep_board()
        training.run.report(training.log_line(out))
        if training.run.step == save_at: training.run.save()
        if training.run.step == stop_at: return training


def timeless(log): return [{k: v for k, v in line.items() if k not in TIMES} for line in log]


def boards_of(out): return {p.name: torch.load(p, weights_only=True) for p in sorted((out/'boards').iterdir())}


def assert_same(a, b):
    "Two dicts of dicts of tensors and numbers, to the bit."
    assert a.keys() == b.keys()
    for name in a:
        for n, t in a[name].items():
            same = torch.equal(t, b[name][n]) if torch.is_tensor(t) else t == b[name][n]
            assert same, (name, n)


@pytest.mark.parametrize('given', [{}, dict(amp='bf16', backbone='resnet18', stride=8), dict(dense_weight=0.),
                                   dict(matching='coord', accumulate=2)])
def test_board_changes_nothing(tmp_path, given):
    "Weights, batch statistics, queues and log are the same bits with boards and without."
    on, off = make(tmp_path/'on', **given), make(tmp_path/'off', **given, board_epochs=0)
    logs = on.fit(), off.fit()
    assert timeless(logs[0]) == timeless(logs[1])
    theirs = off.model.state_dict()
    for n, t in on.model.state_dict().items(): assert torch.equal(t, theirs[n]), n
    assert [m.training for m in on.model.modules()] == [m.training for m in off.model.modules()]
    assert sorted(boards_of(tmp_path/'on')) == ['00000000.pt', '00000005.pt', '00000010.pt', '00000015.pt', 'pairs.pt']
    assert not (tmp_path/'off'/'boards').exists()


@pytest.mark.parametrize('save_at,stop_at', [(4, 12), (5, 5), (7, 10)])
def test_boards_of_a_run_that_goes_on(tmp_path, save_at, stop_at):
    "The same bits as without the interruption; boards from after the checkpoint are taken away and made again."
    make(tmp_path/'whole').fit()
    lost(tmp_path/'cut', save_at, stop_at)
    again = make(tmp_path/'cut')
    again.begin()
    assert max(int(n[:8]) for n in boards_of(tmp_path/'cut') if n != 'pairs.pt') <= save_at
    again.fit()
    assert_same(boards_of(tmp_path/'cut'), boards_of(tmp_path/'whole'))


def test_boards_begin_anew(tmp_path):
    "In a folder without a checkpoint nothing is left of another run, and board_epochs may change on the way."
    lost(tmp_path, 0, 6, seed=1)
    make(tmp_path, epochs=1).fit()
    assert sorted(boards_of(tmp_path)) == ['00000000.pt', '00000005.pt', 'pairs.pt']
    make(tmp_path/'other', epochs=1).fit()
    assert_same(boards_of(tmp_path), boards_of(tmp_path/'other'))
    make(tmp_path, epochs=4, board_epochs=2).fit()
    assert sorted(boards_of(tmp_path))[:-1] == [f'{step:08}.pt' for step in (0, 5, 10, 20)]


def test_first_process_only(tmp_path, monkeypatch):
    monkeypatch.setattr('pixcon.training.rank', lambda: 1)
    training = make(tmp_path)
    training.run.gather = lambda thing: [thing]
    training.begin()
    assert not (tmp_path/'boards').exists()


def test_board_is_what_the_model_says(tmp_path):
    "Matches, weights and maps against the model's own; colours by one basis: equal features, equal colours."
    training = make(tmp_path)
    training.fit()
    pairs, boards = read_boards(tmp_path)
    f_q, f_k = training.look_at_pairs(pairs)
    index, similarity, _, weights = training.model.match(f_q, f_k, pairs['box'], pairs['flip'])
    assert torch.equal(boards[-1]['index'].long(), index)
    torch.testing.assert_close(boards[-1]['weights'].float(), weights, atol=1e-3, rtol=0)
    for i in range(2):
        for k, cell in enumerate(pairs['cells'][i]):
            assert boards[-1]['maps'][i, k].argmax() == index[i, 0, cell]
            assert abs(boards[-1]['maps'][i, k].max() - similarity[i, 0, cell]) < 1e-3
    assert boards[-1]['colours'].shape == (*boards[-1]['index'].shape, 3)
    assert (tmp_path/'boards'/'00000015.pt').stat().st_size < 100_000


def test_strip_and_moving_picture(tmp_path):
    make(tmp_path).fit()
    strip = show_strip(tmp_path, 3)
    assert strip.width >= 800 and len(strip.getcolors()) > 50
    animate(tmp_path, tmp_path/'board.webp')
    with Image.open(tmp_path/'board.webp') as moving:
        assert moving.n_frames == 4 and moving.width >= 800
        frames = []
        for i in range(4):
            moving.seek(i)
            frames.append(np.asarray(moving.convert('RGB')).astype(int))
    assert all(abs(a - b).mean() > .5 for a, b in zip(frames, frames[1:]))  # they differ


def test_command_line(tmp_path, capsys):
    make(tmp_path, epochs=2).fit()
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-2].startswith('step 10, epoch 2.0: loss')
    for words, message in (([str(tmp_path), 'a.mp4'], "got 'a.mp4'"), ([str(tmp_path/'none')], 'config.json')):
        with pytest.raises(SystemExit): main(words)
        assert message in capsys.readouterr().err


def test_picture_of_the_readme():
    "Small, moving, wide enough."
    path = ROOT/'nbs'/'images'/'board.webp'
    assert path.stat().st_size < 400_000
    with Image.open(path) as moving: assert moving.n_frames >= 8 and moving.width >= 800


def line(i, **more):
    return dict(step=i + 1, loss=8 - 4*(1 - .9**i), loss_uninformed=8., skipped=0, data_wait=0., spread=.8, rank=9.,
                match_own_place=.2, match_own_place_if_right=.1) | more


@pytest.mark.parametrize('log,name', [
    ([], 'too early to tell'),
    ([line(i) for i in range(3)], 'too early to tell'),
    ([line(i) for i in range(40)], 'healthy'),
    ([dict(step=i + 1, loss=.4 + .9**i, skipped=0) for i in range(40)], 'healthy'),            # fine-tuning
    ([line(i, loss_uninformed=1 + .1*i, loss=.9 + .08*i) for i in range(40)], 'queue still filling'),
    ([line(i, loss=math.nan) for i in range(40)], 'diverging'),
    ([line(i, loss=8 + .2*i) for i in range(40)], 'diverging'),
    ([line(i, loss=5. if i == 20 else line(i)['loss']) for i in range(40)], 'healthy'),        # one bad batch
    ([line(i, loss_dense=0.) if i < 20 else line(i - 20, step=i + 1, loss_dense=1.) for i in range(40)], 'healthy'),
    ([line(i, spread=.8 if i < 30 else .1) for i in range(40)], 'collapse suspected'),
    ([line(i, rank=1.2) for i in range(40)], 'collapse suspected'),
    ([line(i, skipped=i//4) for i in range(40)], 'skipped steps'),
    ([line(i, step=400*i, skipped=i) for i in range(40)], 'healthy'),                          # fp16 looks for its scale
    ([line(i, match_own_place=.5) for i in range(40)], 'matches stuck to their own place'),
    ([line(i, match_own_place=.9, match_own_place_if_right=.8) for i in range(40)], 'healthy'),
    ([line(i, data_wait=.3) for i in range(40)], 'starved for data'),
    ([line(i, data_wait=.9 if i < 20 else .1) for i in range(40)], 'healthy'),                 # only at first
    ([line(i, loss=7.97) for i in range(40)], 'nothing learned yet')])
def test_verdict(log, name): assert list(verdict(log)) == [name]


def test_verdict_says_all_that_is_wrong():
    log = [line(i, data_wait=.5, spread=.01, loss=math.nan) for i in range(40)]
    assert list(verdict(log)) == ['diverging', 'collapse suspected', 'starved for data']
    assert all(len(why) > 20 for _, why in LIMITS.values())


def test_real_collapse(tmp_path):
    "Keys that are all alike are found in a real log: a head whose last layer gives one direction."
    training = make(tmp_path, epochs=4, dense_start=0.)
    last = [m for m in training.model.target.global_head.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad(): last.weight.zero_()
    training.model.update_target = lambda momentum: None
    if last.bias is None: last.bias = torch.nn.Parameter(torch.ones(last.out_features), requires_grad=False)
    else: last.bias.data.fill_(1.)
    assert 'collapse suspected' in verdict(training.fit())


def test_tensorboard_goes_on(tmp_path):
    "Each step once with the value of the log, boards as pictures, although the run was lost after its checkpoint."
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='optional')
    lost(tmp_path, 7, 12, track='tensorboard')
    make(tmp_path, track='tensorboard').fit()
    events = accumulator.EventAccumulator(str(tmp_path/'tensorboard')).Reload()
    log = read_log(tmp_path)
    for name in ('loss', 'loss_uninformed', 'momentum'):
        assert [e.step for e in events.Scalars(name)] == list(range(1, 16))
        np.testing.assert_allclose([e.value for e in events.Scalars(name)], [line[name] for line in log], rtol=1e-6)
    assert [e.step for e in events.Images('board')] == [0, 5, 10, 15]
    assert set(log[-1]) - {'step'} <= set(events.Tags()['scalars'])


def test_tensorboard_asked_for_later(tmp_path):
    "All lines of the log so far, then the new ones."
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='optional')
    make(tmp_path, epochs=2).fit()
    make(tmp_path, epochs=3, track='tensorboard').fit()
    events = accumulator.EventAccumulator(str(tmp_path/'tensorboard')).Reload()
    assert [e.step for e in events.Scalars('loss')] == list(range(1, 16))


WANDB = '''
calls = []
class Image:
    def __init__(self, pixels): assert pixels.ndim == 3
class Sent:
    def log(self, values, step): calls.append((step, values))
    def finish(self): calls.append('finish')
def init(**given):
    calls.append(given)
    return Sent()
'''


def test_wandb_goes_on(tmp_path, monkeypatch):
    "One id for the folder, each line once, boards as pictures; a run that begins anew gets another id."
    (tmp_path/'wandb.py').write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    lost(tmp_path/'run', 7, 12, track='wandb')
    make(tmp_path/'run', track='wandb').fit()
    import wandb
    first, second = [c for c in wandb.calls if isinstance(c, dict)]
    assert first['id'] == second['id'] and second['resume'] == 'allow' and second['config']['epochs'] == 3
    sent = [c for c in wandb.calls if isinstance(c, tuple)]
    lines = [(step, values) for step, values in sent if 'loss' in values]
    assert [step for step, _ in lines] == list(range(1, 16)) and wandb.calls[-1] == 'finish'
    log = read_log(tmp_path/'run')
    assert [values['loss'] for _, values in lines] == [line['loss'] for line in log]
    assert [step for step, values in sent if 'board' in values] == [0, 5, 10, 15]
    assert [step for step, _ in sent] == sorted(step for step, _ in sent)     # W&B refuses steps that go back
    for path in (tmp_path/'run').glob('checkpoint*.pt'): path.unlink()
    make(tmp_path/'run', track='wandb').begin()
    assert [c for c in wandb.calls if isinstance(c, dict)][-1]['id'] != first['id']
    monkeypatch.delitem(sys.modules, 'wandb')


def test_missing_package(monkeypatch, tmp_path):
    "Said before anything is written, with the command that helps."
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ImportError, match="track 'both' needs a package that is not installed: pip install tensorboard"):
        find_trackers('both')
    with pytest.raises(ImportError, match='pip install wandb'): make(tmp_path/'run', track='wandb')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('looked_at', [True, False])
def test_one_display(tmp_path, monkeypatch, capsys, looked_at):
    "In an editor one display, updated, and no printed line; under papermill the display and lines."
    shown = []
    class Handle:
        def update(self, data, raw): shown.append(('update', data))
    def display(data, raw, display_id):
        shown.append(('new', data))
        return Handle()
    monkeypatch.setattr('IPython.display.display', display)
    parent = dict(metadata=dict(cellId='a') if looked_at else {})
    monkeypatch.setattr(run_module, '_kernel', lambda: SimpleNamespace(get_parent=lambda: parent))
    training = make(tmp_path, board_epochs=0)
    training.begin()
    training.run.drawn -= 100
    training.run.printed -= 100
    for parts in training.steps(): training.run.report(training.log_line(training.train_step(parts)))
    assert [kind for kind, _ in shown] == ['new'] + ['update']*(len(shown) - 1) and len(shown) > 1
    assert 'value="15" max="15"' in shown[-1][1]['text/html'] and 'data:image/png;base64' in shown[-1][1]['text/html']
    assert shown[-1][1]['text/plain'].startswith('step 15/15, epoch 3.0: loss')
    assert len(shown[-1][1]['text/html']) < 60_000
    printed = [said for said in capsys.readouterr().out.splitlines() if said.startswith('step')]
    assert [said.split(':')[0] for said in printed] == ([] if looked_at else ['step 1/15, epoch 0.2', 'step 15/15, epoch 3.0'])


def test_time_left_is_that_of_the_run(tmp_path):
    "At the pace of the last lines, saving and drawing included."
    training = make(tmp_path, board_epochs=0)
    run = training.run
    run.begin()
    run.step, run.since = 5, (5, run.since[1] + 20)
    assert abs(run.time_left() - 40) < 1e-6
    assert run.how_far(dict(loss=1., images_per_s=9., epoch=1.)).endswith('40 s left')


def test_moments_and_words(tmp_path):
    assert moments_of([3, 4]) == [3, 4]
    (tmp_path/'config.json').write_text(json.dumps(dict(iterations=4)))
    (tmp_path/'log.jsonl').write_text(json.dumps(dict(step=4, loss=1., images_per_s=2.)) + '\n')
    assert say(tmp_path)[0] == 'step 4: loss 1.000, 2 images/s'
