"""A run that was cut off and started again is the run that was not."""
import json
import pytest
import torch
from pixcon.training import Run, configure, read_log

TINY = dict(data='scenes', scenes=20, batch=4, epochs=3, size=32, hidden=16, dim=8, queue=12, log_steps=1)


def run_whole(out, **kwargs):
    "Trains to the end."
    run = Run(*configure(**{**TINY, **kwargs}, out=out))
    return run, run.fit()


def cut(out, save_at, stop_at, **kwargs):
    "Trains, saves after one step and is lost after another."
    run = Run(*configure(**{**TINY, **kwargs}, out=out))
    run.start()
    for batch in run.loader():
        run.log_line(run.train_step(batch), 0.)
        if run.step == save_at: run.save()
        if run.step == stop_at: return


@pytest.mark.parametrize('save_at,stop_at,kwargs', [(1, 1, {}), (4, 9, {}), (10, 11, {}), (7, 8, dict(optimizer='sgd', lr=.05, matching='coord'))])
def test_continues_bit_for_bit(tmp_path, save_at, stop_at, kwargs):
    "Weights, queues, optimizer and logged losses are equal, mid-epoch and at an epoch's end."
    whole, log = run_whole(tmp_path/'whole', **kwargs)
    cut(tmp_path/'cut', save_at, stop_at, **kwargs)
    again, log_again = run_whole(tmp_path/'cut', **kwargs)
    for (n, a), b in zip(again.model.state_dict().items(), whole.model.state_dict().values()): assert torch.equal(a, b), n
    timeless = lambda lines: [{k: v for k, v in line.items() if k != 'images_per_s'} for line in lines]
    assert timeless(log) == timeless(log_again)


def test_dropout_is_a_function_of_the_step(tmp_path):
    "A backbone with stochastic depth continues exactly, too."
    kwargs = dict(backbone='efficientnet_b0', stride=8, epochs=1)
    whole, _ = run_whole(tmp_path/'whole', **kwargs)
    cut(tmp_path/'cut', 2, 3, **kwargs)
    again, _ = run_whole(tmp_path/'cut', **kwargs)
    for (n, a), b in zip(again.model.state_dict().items(), whole.model.state_dict().values()): assert torch.equal(a, b), n


def test_finished_run_stays_as_it_is(tmp_path):
    "The same command on a finished run trains nothing."
    first, log = run_whole(tmp_path)
    second, again = run_whole(tmp_path)
    assert log == again and second.step == first.step


def test_longer_run_goes_on(tmp_path):
    "More epochs continue from the end of the shorter run."
    run_whole(tmp_path, epochs=2)
    _, log = run_whole(tmp_path, epochs=4)
    assert [line['step'] for line in log] == list(range(1, 21))


def test_refuses_another_run(tmp_path):
    "Parameters that change what is computed must be those of the checkpoint."
    run_whole(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="tau 0.2, now 0.3"): run_whole(tmp_path, epochs=1, tau=.3)


def test_refuses_other_images(tmp_path):
    "The same number of files under other names is another data set; the same files elsewhere are not."
    from PIL import Image
    for folder, name in (('a', 'photo'), ('b', 'photo'), ('c', 'other')):
        (tmp_path/folder).mkdir()
        for i in range(4): Image.effect_noise((40, 40), 50 + i).save(tmp_path/folder/f'{name}{i}.png')
    kwargs = dict(recipe='small', epochs=1)
    run_whole(tmp_path/'run', **{**kwargs, 'data': tmp_path/'a'})
    run_whole(tmp_path/'run', **{**kwargs, 'data': tmp_path/'b'})
    with pytest.raises(ValueError, match='images'): run_whole(tmp_path/'run', **{**kwargs, 'data': tmp_path/'c'})


def test_line_cut_off(tmp_path):
    "A log whose last line was not written to its end is read up to there; a run with no checkpoint starts a new log."
    (tmp_path/'log.jsonl').write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [{'step': 1}]
    _, log = run_whole(tmp_path, epochs=1)
    assert [line['step'] for line in log] == list(range(1, 6))


def test_ten_bad_steps_in_a_row_stop(tmp_path):
    "The run stops and says so, the skipped steps are counted with their images, and what was saved before stays."
    run = Run(*configure(**TINY, queue_start='random', out=tmp_path))
    run.start()
    run.save()
    run.photometric = lambda view, draw: torch.full(view.shape, torch.nan)
    weights = {n: p.clone() for n, p in run.model.named_parameters() if not n.startswith('target')}
    with pytest.raises(FloatingPointError, match='10 steps in a row, up to step 10, were not finite'): run.fit()
    for n, p in run.model.named_parameters():
        if n in weights: assert torch.equal(p, weights[n]), n
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 0
    noted = [json.loads(line) for line in (tmp_path/'skipped.jsonl').read_text().splitlines()]
    assert [line['step'] for line in noted] == list(range(1, 11)) and all(len(line['images']) == 4 for line in noted)


def test_folder_holds_what_the_run_was(tmp_path):
    "config.json whole, log.jsonl with the promised columns, weights under torchvision's names."
    from safetensors.torch import load_file
    import torchvision
    run, _ = run_whole(tmp_path, epochs=1)
    config = json.loads((tmp_path/'config.json').read_text())
    assert config['scenes'] == 20 and config['recipe'] == 'small'
    for line in read_log(tmp_path): assert {'step', 'loss', 'loss_image', 'loss_dense', 'lr', 'momentum', 'images_per_s'} <= set(line)
    assert {'positive', 'matched_inside', 'weighted', 'spread', 'rank', 'queue_fill'} <= set(read_log(tmp_path)[-1])
    keys = set(torchvision.models.get_model(config['backbone']).state_dict())
    assert set(load_file(tmp_path/'backbone.safetensors')) <= keys
