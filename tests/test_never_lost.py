"""A run that is killed, meets a full disk or a damaged checkpoint, or is shared among processes, ends as it would have."""
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from pixcon.training import Run, configure, launch, read_log

TINY = dict(data='scenes', scenes=20, batch=4, epochs=6, size=32, hidden=16, dim=8, queue=12, log_steps=1, save_epochs=1, save_minutes=0)
KILLS = int(os.environ.get('PIXCON_KILLS', 4))
flags = lambda **kwargs: [f'--{n}={v}' for n, v in {**TINY, **kwargs}.items()]
environment = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')} | dict(OMP_NUM_THREADS='1')


def start(*words, **kwargs): return subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def same(a, b):
    "Two run folders hold the same weights, queues and lines of the log."
    a, b = Path(a), Path(b)
    states = [torch.load(p/'checkpoint.pt', weights_only=True) for p in (a, b)]
    for n, t in states[0]['model'].items(): assert torch.equal(t, states[1]['model'][n]), n
    logs = [[{k: v for k, v in line.items() if k != 'images_per_s'} for line in read_log(p)] for p in (a, b)]
    assert str(logs[0]) == str(logs[1]) and states[0]['step'] == states[1]['step']


def test_killed_at_random_moments(tmp_path):
    "SIGKILL at any moment, also while a checkpoint is written; the same command again ends with the same bits."
    begun = time.time()
    assert start('-m', 'pixcon.training', *flags(out=tmp_path/'whole')).wait(120) == 0
    whole, rng, kills = time.time() - begun, np.random.default_rng(0), 0
    for _ in range(10*KILLS):
        run = start('-m', 'pixcon.training', *flags(out=tmp_path/'killed'))
        if kills == KILLS: assert run.wait(120) == 0; break
        log, until = tmp_path/'killed'/'log.jsonl', time.time() + 2*whole
        lines = len(read_log(tmp_path/'killed'))
        while run.poll() is None and len(read_log(log.parent)) <= lines and time.time() < until: time.sleep(.01)
        time.sleep(rng.uniform(0, .15))
        if run.poll() is None: run.kill(); kills += 1
        run.wait()
        if run.returncode == 0 and len(read_log(log.parent)) == 30 and kills < KILLS: (tmp_path/'killed').rename(tmp_path/f'ended{kills}')
    same(tmp_path/'whole', tmp_path/'killed')
    for ended in tmp_path.glob('ended*'): same(tmp_path/'whole', ended)


def alive(word):
    "Process numbers of those with a word in their command line or environment, zombies left out."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if word in (p/'environ').read_bytes().decode(errors='replace') and (p/'stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z': found.append(int(p.name))
        except (OSError, IndexError): pass
    return found


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc')
def test_papermill_killed_leaves_nothing(tmp_path, processes):
    "No process is left 30 seconds after papermill was killed, loader processes included; the run goes on from there, and one process's ends with the bits of the run that was not killed."
    mark = f'PIXCON_TEST_MARK=m{time.time()}'
    command = ['papermill', str(Path(__file__).parent.parent/'nbs'/'train.ipynb'), 'out.ipynb', '--no-progress-bar', '-p', 'out', str(tmp_path/'run'), '-p', 'processes', str(processes), '-p', 'workers', '1']
    for n, v in {**TINY, 'epochs': 30}.items(): command += ['-p', n, str(v)]
    mill = subprocess.Popen(command, cwd=tmp_path, env=environment | dict([mark.split('=')]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while len(read_log(tmp_path/'run')) < 8 and time.time() < until and mill.poll() is None: time.sleep(.2)
    assert mill.poll() is None and len(alive(mark)) > processes
    mill.kill(); mill.wait()
    gone = time.time() + 30
    while alive(mark) and time.time() < gone: time.sleep(.5)
    assert not alive(mark)
    step = torch.load(tmp_path/'run'/'checkpoint.pt', weights_only=True)['step']
    again = Run(*configure(**{**TINY, 'epochs': 30}, out=tmp_path/'run'))
    again.start()
    assert 0 < again.step == step < again.total
    if processes > 1: return
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
    assert f'at step {step} of 150' in (tmp_path/'out.ipynb').read_text()
    assert start('-m', 'pixcon.training', *flags(epochs=30, save_minutes=10, out=tmp_path/'whole')).wait(300) == 0
    same(tmp_path/'whole', tmp_path/'run')


def test_damaged_checkpoint(tmp_path):
    "Cut off, empty or noise: it is set aside with a warning, the one before is used, and the end is the same."
    Run(*configure(**TINY, out=tmp_path/'whole')).fit()
    Run(*configure(**{**TINY, 'epochs': 4}, out=tmp_path/'half')).fit()
    for k, spoil in enumerate((lambda b: b[:len(b)//2], lambda b: b'', lambda b: bytes(reversed(b)))):
        folder = tmp_path/f'spoiled{k}'
        cut = Run(*configure(**TINY, out=folder))
        cut.start()
        for batch in cut.loader():
            cut.log_line(cut.train_step(batch), 0.)
            if cut.step in (5, 10): cut.save()
            if cut.step == 12: break
        newest = folder/'checkpoint.pt'
        newest.write_bytes(spoil(newest.read_bytes()))
        again = Run(*configure(**TINY, out=folder))
        with pytest.warns(UserWarning, match=r"truncated or not a checkpoint .* set aside as checkpoint.damaged, and the one before is used"): again.fit()
        assert (folder/'checkpoint.damaged').exists()
        same(tmp_path/'whole', folder)


def test_no_checkpoint_left(tmp_path):
    "Both damaged: the run does not silently begin anew."
    Run(*configure(**{**TINY, 'epochs': 1}, out=tmp_path)).fit()
    for path in tmp_path.glob('checkpoint*.pt'): path.write_bytes(b'')
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with pytest.raises(ValueError, match="no checkpoint in .* can be read. Choose another `out`"): Run(*configure(**TINY, out=tmp_path)).fit()


def test_full_disk(tmp_path):
    "A file can't grow: a clear message, the old checkpoint intact, no half file left; with room again the run ends as it would have."
    Run(*configure(**TINY, out=tmp_path/'whole')).fit()
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    first = Run(*configure(**TINY, out=tmp_path/'full'))
    first.start()
    for batch in first.loader():
        first.log_line(first.train_step(batch), 0.)
        if first.step == 3: first.save(); break
    old = (tmp_path/'full'/'checkpoint.pt').read_bytes()
    assert len(old) > 300_000
    full = start('-m', 'pixcon.training', *flags(out=tmp_path/'full'), preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), small()))
    said = full.communicate(timeout=120)[0]
    assert full.returncode != 0 and 'could not be written' in said and 'Is the disk full?' in said and 'Traceback' not in said, said
    assert (tmp_path/'full'/'checkpoint.pt').read_bytes() == old and not list((tmp_path/'full').glob('*.part'))
    Run(*configure(**TINY, out=tmp_path/'full')).fit()
    same(tmp_path/'whole', tmp_path/'full')


def test_accumulate(tmp_path):
    "Two parts: optimizer, target, queues and schedule move once a step; without batch statistics the loss's gradient is that of the whole batch."
    grads = []
    for parts in (1, 2):
        run = Run(*configure(**{**TINY, 'batch': 8}, reweight=False, queue_start='random', accumulate=parts, out=tmp_path/str(parts)))
        run.model.eval()
        batches = iter(run.loader())
        outs = [run.backward(next(batches), parts) for _ in range(parts)]
        grads.append({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
        keys = run.gathered(outs)['image_keys']
        assert keys.shape == (8, 2, 8)
        grads[-1]['keys'] = keys
    for n, g in grads[0].items(): torch.testing.assert_close(g, grads[1][n], atol=1e-6, rtol=1e-4)
    _, log = (run := Run(*configure(**{**TINY, 'batch': 8}, accumulate=2, out=tmp_path/'run'))), run.fit()
    assert run.step == 12 and len(log) == 12 and run.model.image_queue.pointer.item() == 12*8 % 12 and run.step == run.total


PAIR = '''
import json, sys, torch, torch.distributed as dist
from pixcon.model import over_processes
from pixcon.training import Run, configure, _join
_join()
run = Run(*configure(**json.loads(sys.argv[1])))
run.model.eval()                                                   # no batch statistics: what is left must be equal
out = []
for parts in zip(*[iter(run.loader())]*run.config.accumulate):
    found = run.train_step(parts)
    out.append(over_processes(found['loss_image'] + found['loss_dense']).item())
    if run.step == 4: break
torch.save(dict(loss=out, model=run.model.state_dict()), f"{sys.argv[2]}-{dist.get_rank()}.pt")
'''


def test_two_processes_are_one(tmp_path):
    "Queues and weights are the same bits on both; losses are those of one process with the whole batch, to 1e-6."
    (tmp_path/'pair.py').write_text(PAIR)
    kwargs = {**TINY, 'batch': 8, 'queue_start': 'random', 'out': str(tmp_path/'run')}
    for n in (1, 2):
        run = start('-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}', str(tmp_path/'pair.py'), json.dumps(kwargs), str(tmp_path/str(n)))
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 0, said
    one, first, second = (torch.load(tmp_path/f'{n}.pt') for n in ('1-0', '2-0', '2-1'))
    for n, t in first['model'].items(): assert torch.equal(t, second['model'][n]), n
    np.testing.assert_allclose(first['loss'], one['loss'], rtol=1e-6)
    for n, t in one['model'].items(): torch.testing.assert_close(first['model'][n], t, atol=1e-5, rtol=1e-4)


def test_another_number_of_processes(tmp_path):
    "A run begun by two goes on with one, and the other way round; each image once an epoch."
    kwargs = {**TINY, 'batch': 8, 'out': str(tmp_path/'run')}
    said = []
    for epochs, processes in ((2, 2), (4, 1), (6, 2)):
        if processes == 1: Run(*configure(**{**kwargs, 'epochs': epochs})).fit()
        else: launch({**kwargs, 'epochs': epochs}, processes, said.append)
    assert [line['step'] for line in read_log(tmp_path/'run')] == list(range(1, 13)) and any('continuing' in line for line in said)


def test_two_nodes(tmp_path):
    "Two torchruns that meet on loopback make one run."
    with socket.socket() as free: free.bind(('localhost', 0)); port = free.getsockname()[1]
    words = lambda rank: ['-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=1', f'--node-rank={rank}', '--rdzv-backend=c10d', f'--rdzv-endpoint=localhost:{port}', '--rdzv-id=t',
                          '-m', 'pixcon.training', *flags(epochs=2, out=tmp_path/'run')]
    nodes = [start(*words(r)) for r in (0, 1)]
    said = [n.communicate(timeout=200)[0] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], said
    assert 'on 2 x cpu' in said[0] + said[1] and len(read_log(tmp_path/'run')) == 10


def test_a_process_that_dies_stops_the_others(tmp_path):
    "The error of the one that failed is in the message."
    with pytest.raises(RuntimeError, match='(?s)training in 2 processes failed.*pixcon.training: batch must be at most the number of images, 20, got 40'):
        launch({**TINY, 'batch': 40, 'out': str(tmp_path/'run')}, 2, lambda line: None)


def test_bad_images_of_all_processes_count(tmp_path):
    "Two of 150 images are cut off, found by whichever process: together they are more than 1 %, and the list names both."
    from pixcon.scenes import Scenes
    from torchvision.io import encode_jpeg
    (tmp_path/'data').mkdir()
    for i in range(150): (tmp_path/'data'/f'{i:03d}.jpg').write_bytes(encode_jpeg(Scenes(150, 48)[i]).numpy().tobytes())
    for i in (7, 90): path = tmp_path/'data'/f'{i:03d}.jpg'; path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(RuntimeError, match=r"(?s)2 of 150 images can't be read, more than 1%:.*007.jpg: could not be read while training.*090.jpg"):
        launch({**TINY, 'data': str(tmp_path/'data'), 'recipe': 'small', 'batch': 10, 'epochs': 2, 'cache': 'off', 'workers': 0, 'out': str(tmp_path/'run')}, 2, lambda line: None)
