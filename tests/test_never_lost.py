"""A run that is killed, meets a full disk or a damaged checkpoint, or is shared among processes, ends as it would have."""
import copy
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
import timm
import torch
from PIL import Image
from pixcon.distributed import SharedBatchNorm, join, launch, share_norms
from pixcon.run import read_log
from pixcon.scenes import Scenes
from pixcon.training import Pretraining, configure

ROOT = Path(__file__).parent.parent
TINY = dict(data='scenes', scenes=20, batch=4, epochs=6, size=32, hidden=16, dim=8, queue=12,
            log_steps=1, save_epochs=1, save_minutes=0, amp='off')
KILLS = int(os.environ.get('PIXCON_KILLS', 4))
PRECISIONS = ('off', 'bf16')
MODULE = 'pixcon.training'
not_given = ('IN_TEST', 'PIXCON_DATA')
environment = {k: v for k, v in os.environ.items() if k not in not_given} | dict(OMP_NUM_THREADS='1')


def flags(**given): return [f'--{n}={v}' for n, v in {**TINY, **given}.items()]


def start(*words, given=None, **kwargs):
    "A Python process with one thread, whose output is collected."
    return subprocess.Popen([sys.executable, *words], env=environment | (given or {}), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **kwargs)


def make(out, **given): return Pretraining(*configure(**{**TINY, **given}, out=out))


def part_of_a_run(out, save_at, stop_at, **given):
    "Trains up to a step, saving after some."
    training = make(out, **given)
    training.begin()
    for parts in training.steps():
        training.run.report(training.log_line(training.train_step(parts)))
        if training.run.step in save_at: training.run.save()
        if training.run.step == stop_at: return training


def same(a, b):
    "Two run folders hold the same weights, queues and lines of the log."
    a, b = Path(a), Path(b)
    states = [torch.load(p/'checkpoint.pt', weights_only=True) for p in (a, b)]
    for n, t in states[0]['model'].items(): assert torch.equal(t, states[1]['model'][n]), n
    times = ('images_per_s', 'seconds', 'data_wait')
    logs = [[{k: v for k, v in line.items() if k not in times} for line in read_log(p)] for p in (a, b)]
    assert str(logs[0]) == str(logs[1]) and states[0]['step'] == states[1]['step']


@pytest.mark.parametrize('amp', PRECISIONS)
def test_killed_at_random_moments(tmp_path, amp):
    "SIGKILL at any moment, also while a checkpoint is written, the same command again ends with the same bits."
    begun = time.time()
    assert start('-m', MODULE, *flags(out=tmp_path/'whole', amp=amp)).wait(120) == 0
    whole, rng, kills = time.time() - begun, np.random.default_rng(0), 0
    wanted = KILLS if amp == 'off' else max(KILLS//2, 1)
    killed = tmp_path/'killed'
    for _ in range(10*wanted):
        run = start('-m', MODULE, *flags(out=killed, amp=amp))
        if kills == wanted:
            assert run.wait(120) == 0
            break
        lines, until = len(read_log(killed)), time.time() + 2*whole
        while run.poll() is None and len(read_log(killed)) <= lines and time.time() < until: time.sleep(.01)
        time.sleep(rng.uniform(0, .15))
        if run.poll() is None:
            run.kill()
            kills += 1
        run.wait()
        ended = run.returncode == 0 and len(read_log(killed)) == 30
        if ended and kills < wanted: killed.rename(tmp_path/f'ended{kills}')
    same(tmp_path/'whole', killed)
    for ended in tmp_path.glob('ended*'): same(tmp_path/'whole', ended)


def alive(word):
    "Process numbers of those with a word in their environment, zombies left out."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            told = (p/'environ').read_bytes().decode(errors='replace')
            state = (p/'stat').read_text().rsplit(')', 1)[1].split()[0]
        except (OSError, IndexError): continue
        if word in told and state != 'Z': found.append(int(p.name))
    return found


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc')
def test_papermill_killed_leaves_nothing(tmp_path, processes):
    """No process is left 30 seconds after papermill was killed, loader processes included.

    The run goes on from there, and one process's ends with the bits of the run that was not killed."""
    mark, value = 'PIXCON_TEST_MARK', f'm{time.time()}'
    run = tmp_path/'run'
    command = ['papermill', str(ROOT/'nbs'/'train.ipynb'), 'out.ipynb', '--no-progress-bar']
    given = {**TINY, 'epochs': 30, 'out': run, 'processes': processes, 'workers': 1}
    for n, v in given.items(): command += ['-p', n, str(v)]
    mill = subprocess.Popen(command, cwd=tmp_path, env=environment | {mark: value},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while len(read_log(run)) < 8 and time.time() < until and mill.poll() is None: time.sleep(.2)
    assert mill.poll() is None and len(alive(f'{mark}={value}')) > processes
    mill.kill()
    mill.wait()
    gone = time.time() + 30
    while alive(f'{mark}={value}') and time.time() < gone: time.sleep(.5)
    assert not alive(f'{mark}={value}')
    step = torch.load(run/'checkpoint.pt', weights_only=True)['step']
    again = make(run, epochs=30)
    again.begin()
    assert 0 < again.run.step == step < again.run.total
    if processes > 1: return
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert f'at step {step} of 150' in (tmp_path/'out.ipynb').read_text()
    whole = flags(epochs=30, save_minutes=10, out=tmp_path/'whole')
    assert start('-m', MODULE, *whole).wait(300) == 0
    same(tmp_path/'whole', run)


def test_damaged_checkpoint(tmp_path):
    "Cut off, empty or noise: it is set aside with a warning, the one before is used, and the end is the same."
    make(tmp_path/'whole').fit()
    spoilers = (lambda b: b[:len(b)//2], lambda b: b'', lambda b: bytes(reversed(b)))
    message = 'truncated or not a checkpoint .* set aside as checkpoint.damaged, and the one before is used'
    for k, spoil in enumerate(spoilers):
        folder = tmp_path/f'spoiled{k}'
        part_of_a_run(folder, (5, 10), 12)
        newest = folder/'checkpoint.pt'
        newest.write_bytes(spoil(newest.read_bytes()))
        with pytest.warns(UserWarning, match=message): make(folder).fit()
        assert (folder/'checkpoint.damaged').exists()
        same(tmp_path/'whole', folder)


def test_no_checkpoint_left(tmp_path):
    "Both damaged: the run does not silently begin anew."
    make(tmp_path, epochs=1).fit()
    for path in tmp_path.glob('checkpoint*.pt'): path.write_bytes(b'')
    message = 'no checkpoint in .* can be read. Choose another `out`'
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with pytest.raises(ValueError, match=message): make(tmp_path).fit()


def test_full_disk(tmp_path):
    "A file can't grow: a clear message, the old checkpoint intact, no half file left, and with room the run goes on."
    make(tmp_path/'whole').fit()
    full = tmp_path/'full'
    part_of_a_run(full, (3,), 3)
    old = (full/'checkpoint.pt').read_bytes()
    assert len(old) > 300_000
    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    child = start('-m', MODULE, *flags(out=full), preexec_fn=small)
    said = child.communicate(timeout=120)[0]
    assert child.returncode != 0 and 'Traceback' not in said, said
    assert 'could not be written' in said and 'Is the disk full?' in said, said
    assert (full/'checkpoint.pt').read_bytes() == old and not list(full.glob('*.part'))
    make(full).fit()
    same(tmp_path/'whole', full)


@pytest.mark.parametrize('amp,atol', [('off', 1e-6), ('bf16', 3e-3)])
@pytest.mark.parametrize('variant', [dict(), dict(reweight=False), dict(matching='coord'), dict(matching='coord', max_dist=.5)])
def test_accumulate(tmp_path, variant, amp, atol):
    """Without batch statistics two parts have the gradient of the whole batch, weighted cells or not.

    Bounds: sums in another order in float32, and in bf16 another rounding of each product, of 1/256."""
    grads = []
    for n in (1, 2):
        training = make(tmp_path/str(n), batch=8, dense_start=0., queue_start='random', accumulate=n, amp=amp, **variant)
        training.model.eval()
        parts = next(iter(training.steps()))
        totals = training.weight_totals(parts)
        outs = [training.backward(part, totals, n) for part in parts]
        found = {n: p.grad.clone() for n, p in training.model.named_parameters() if p.grad is not None}
        keys = training.gathered(outs)['image_keys']
        assert keys.shape == (8, 2, 8) and any('dense' in name for name in found)
        grads.append(found | dict(keys=keys))
    rtol = 1e-4 if amp == 'off' else 5e-2
    for n, g in grads[0].items(): torch.testing.assert_close(g, grads[1][n], atol=atol, rtol=rtol)


def test_looking_at_the_weights_leaves_the_network_as_it_is(tmp_path):
    "The pass before an accumulated step moves no running statistic, and no weight has a gradient."
    training = make(tmp_path, batch=8, accumulate=2, dense_start=0., matching='sim')
    parts = next(iter(training.steps()))
    before = {n: t.clone() for n, t in training.model.state_dict().items()}
    totals = training.weight_totals(parts)
    assert totals.shape == (2,) and (totals > 0).all()
    for n, t in training.model.state_dict().items(): assert torch.equal(t, before[n]), n
    assert all(p.grad is None for p in training.model.parameters())


def test_accumulated_steps_move_once(tmp_path):
    "Optimizer, target encoder, queues and schedule move once per step, however many parts it has."
    training = make(tmp_path, batch=8, accumulate=2)
    log = training.fit()
    assert training.run.step == training.run.total == 12 and len(log) == 12
    assert training.model.image_queue.pointer.item() == 12*8 % 12


PAIR = '''
import json, sys, torch
from pixcon.distributed import join, leave, rank
from pixcon.model import mean_over_processes
from pixcon.training import Pretraining, configure
join()
training = Pretraining(*configure(**json.loads(sys.argv[1])))
if sys.argv[3] == 'fixed': training.model.eval()
losses = []
for parts in training.steps():
    out = training.train_step(parts)
    losses.append(mean_over_processes(out['loss_image'] + out['loss_dense']).item())
    if training.run.step == 4: break
torch.save(dict(loss=losses, model=training.model.state_dict()), f"{sys.argv[2]}-{rank()}.pt")
leave()
'''


@pytest.mark.parametrize('statistics,amp,bound,dense_start', [
    ('fixed', 'off', 1e-6, 0), ('fixed', 'off', 1e-6, .15), ('fixed', 'bf16', 2e-2, 0), ('of the batch', 'off', 1e-5, 0)])
def test_two_processes_are_one(tmp_path, statistics, amp, bound, dense_start):
    """Queues and weights are the same bits on both, losses are those of one process with the whole batch.

    A dense loss that begins at the third of the four steps changes nothing of that. With batch statistics
    the optimizer is SGD with small steps: AdamW makes whole ones of gradients that are nothing but noise,
    and large ones let noise of 1e-7 grow to 1e-2 in four steps.

    Bounds: float32 sums in another order, in bf16 products rounded in other groups, of 1/256 each."""
    (tmp_path/'pair.py').write_text(PAIR)
    calm = {} if statistics == 'fixed' else dict(optimizer='sgd', lr=.001)
    given = json.dumps({**TINY, 'batch': 8, 'queue_start': 'random', 'amp': amp, 'out': str(tmp_path/'run'),
                        'dense_start': dense_start, **calm})
    for n in (1, 2):
        run = start('-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}',
                    str(tmp_path/'pair.py'), given, str(tmp_path/str(n)), statistics)
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 0, said
    one, first, second = (torch.load(tmp_path/f'{n}.pt') for n in ('1-0', '2-0', '2-1'))
    for n, t in first['model'].items(): assert torch.equal(t, second['model'][n]), n
    np.testing.assert_allclose(first['loss'], one['loss'], rtol=bound)
    if amp != 'off': return
    for n, t in one['model'].items(): torch.testing.assert_close(first['model'][n], t, atol=1e-5, rtol=1e-4)


NORMS = '''
import sys, torch
from pixcon.distributed import join, leave, rank, share_norms, world
join()
torch.manual_seed(0)
sizes = {'2d': (6, 3, 5, 4), '1d': (6, 3), 'cells': (6, 3, 7), 'last': (6, 3, 5, 4), 'half': (6, 3, 5, 4), 'plain': (6, 3),
         'mean': (6, 3, 5, 4)}
found = {}
for name, size in sizes.items():
    kind = torch.nn.BatchNorm2d if len(size) == 4 else torch.nn.BatchNorm1d
    norm = kind(3, affine=name != 'plain', momentum=None if name == 'mean' else .1)
    if norm.affine: torch.nn.init.uniform_(norm.weight, .5, 2.)
    norm = share_norms(torch.nn.Sequential(norm, torch.nn.ReLU()))[0] if world() > 1 else norm
    layout = torch.channels_last if name == 'last' else torch.contiguous_format
    x, goal = (torch.randn(size)*3 + 100 for _ in range(2))
    own = slice(0, 4) if rank() == 0 else slice(4, 6)              # unequal parts
    if world() == 1: own = slice(None)
    x = x[own].to(memory_format=layout, dtype=torch.bfloat16 if name == 'half' else torch.float).requires_grad_()
    for _ in range(2): y = norm(x)
    (y.float()*goal[own]).sum().backward()
    found[name] = [y.detach(), x.grad, norm.running_mean, norm.running_var, norm.num_batches_tracked]
    found[name] += [p.grad for p in norm.parameters()]
torch.save(found, f'{sys.argv[1]}-{rank()}.pt')
leave()
'''


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path):
    """Outputs, gradients and running statistics, of parts of four and two, in several shapes, layouts and formats.

    The numbers are around 100 with deviation 3: a variance from plain sums of squares in float32 would be off."""
    (tmp_path/'norms.py').write_text(NORMS)
    for n in (1, 2):
        words = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}']
        run = start(*words, str(tmp_path/'norms.py'), str(tmp_path/str(n)))
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 0, said
    one, first, second = (torch.load(tmp_path/f'{n}.pt') for n in ('1-0', '2-0', '2-1'))
    for name, (y, dx, *state) in one.items():
        a, b = first[name], second[name]
        close = dict(atol=.1, rtol=2e-2) if name == 'half' else dict(atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(torch.cat([a[0], b[0]]), y, **close)
        torch.testing.assert_close(torch.cat([a[1], b[1]]), dx, **close)
        for whole, own, other in zip(state[:3], a[2:5], b[2:5]):
            assert torch.equal(own, other)
            torch.testing.assert_close(own, whole, **close)
        for whole, own, other in zip(state[3:], a[5:], b[5:]):     # parameters: each has its part's gradient
            torch.testing.assert_close(own + other, whole, atol=1., rtol=1e-3)


@pytest.mark.parametrize('name', ['regnetx_002', 'efficientnet_b0', 'convnext_atto'])
def test_batch_norms_of_timm_keep_their_activation(name):
    "Alone a network computes the same bits with shared norms, under the same names."
    plain = timm.create_model(name, features_only=True, out_indices=[1])
    ours = share_norms(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for a, b in zip(plain(x), ours(x)): assert torch.equal(a, b)
    kept = [m for m in ours.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(m, SharedBatchNorm) for m in kept)


def test_a_batch_norm_of_another_kind_is_named():
    class Own(torch.nn.BatchNorm2d): pass
    with pytest.warns(UserWarning, match="0 is a Own, whose statistics stay those of each process"):
        share_norms(torch.nn.Sequential(Own(3)))


def test_another_number_of_processes(tmp_path):
    "A run begun by two goes on with one, and the other way round, each image once per epoch."
    given = {**TINY, 'batch': 8, 'out': str(tmp_path/'run')}
    said = []
    for epochs, processes in ((2, 2), (4, 1), (6, 2)):
        more = {**given, 'epochs': epochs}
        if processes == 1: Pretraining(*configure(**more)).fit()
        else: launch(MODULE, more, processes, said.append)
    assert [line['step'] for line in read_log(tmp_path/'run')] == list(range(1, 13))
    assert any('continuing' in line for line in said)


def test_two_nodes(tmp_path):
    "Two torchruns that meet on loopback make one run."
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    def words(node):
        return ['-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=1', f'--node-rank={node}',
                '--rdzv-backend=c10d', f'--rdzv-endpoint=localhost:{port}', '--rdzv-id=t',
                '-m', MODULE, *flags(epochs=2, out=tmp_path/'run')]
    nodes = [start(*words(r)) for r in (0, 1)]
    said = [n.communicate(timeout=200)[0] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], said
    assert 'on 2 x cpu' in said[0] + said[1] and len(read_log(tmp_path/'run')) == 10


RESTARTED = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=2', '-m', MODULE]


def test_a_killed_process_is_begun_again(tmp_path):
    "torchrun starts the group anew from the last checkpoint: the run ends with the bits of one that was left alone."
    given = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    whole = start(*RESTARTED, *flags(out=tmp_path/'whole'), given=given)
    assert whole.wait(timeout=200) == 0, whole.stdout.read()
    run = start(*RESTARTED, *flags(out=tmp_path/'run'), given=given)
    until = time.time() + 100
    while len(read_log(tmp_path/'run')) < 12 and time.time() < until: time.sleep(.02)
    children = Path(f'/proc/{run.pid}/task/{run.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 0 and 'continuing' in said, said
    same(tmp_path/'whole', tmp_path/'run')


def test_old_addresses_are_refused(monkeypatch):
    "Without the setting that gives a new group new addresses it might wait for ended processes."
    for name, value in dict(LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, TORCHELASTIC_MAX_RESTARTS=2, TORCHELASTIC_USE_AGENT_STORE=True).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match='--max-restarts 2 needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1'): join()


def test_a_process_that_dies_stops_the_others(tmp_path):
    "The error of the one that failed is in the message."
    own = 'pixcon.training: batch must be at most the number of images, 20, got 40'
    with pytest.raises(RuntimeError, match=f'(?s)pixcon.training in 2 processes failed.*{own}'):
        launch(MODULE, {**TINY, 'batch': 40, 'out': str(tmp_path/'run')}, 2, lambda line: None)


def test_bad_images_of_all_processes_count(tmp_path):
    "Two of 150 images are cut off, found by whichever process: together more than 1 %, and the list names both."
    data = tmp_path/'data'
    data.mkdir()
    scenes = Scenes(150, 48)
    for i in range(150): Image.fromarray(scenes[i].permute(1, 2, 0).numpy()).save(data/f'{i:03d}.jpg')
    for i in (7, 90):
        path = data/f'{i:03d}.jpg'
        path.write_bytes(path.read_bytes()[:900])
    given = {**TINY, 'data': str(data), 'recipe': 'small', 'batch': 10, 'epochs': 2, 'cache': 'off',
             'workers': 0, 'out': str(tmp_path/'run')}
    names = '007.jpg: could not be read while training.*090.jpg'
    with pytest.raises(RuntimeError, match=f"(?s)2 of 150 images can't be read, more than 1%:.*{names}"):
        launch(MODULE, given, 2, lambda line: None)


CACHED = '''
import json, os, re, sys, tempfile, torch
from pixcon import data, distributed, training
read = []
own = data.read_quietly
data.read_quietly = lambda path, *more: read.append(str(path)) or own(path, *more)
distributed.join()
c, images = training.configure(**json.loads(sys.argv[1]))
kept = training.cached(images)
own_file = re.escape(tempfile.gettempdir()) + r'/tmp\\w+( \\(deleted\\))?$'
shared = [line for line in open('/proc/self/maps') if re.search(own_file, line.strip())]
found = [None if i == 3 else kept[i].clone() for i in range(len(kept))]
try: kept[3]
except ValueError as e: why = str(e)
torch.save(dict(read=len(read), found=found, sizes=images.sizes, shared=len(shared), why=why), f'{sys.argv[2]}-{distributed.rank()}.pt')
'''


def test_images_are_in_memory_once_a_machine(tmp_path):
    "Two processes: one looks at the headers and decodes, both have the same images from one file that nobody else sees."
    folder = tmp_path/'data'
    folder.mkdir()
    scenes = Scenes(12, 40)
    for i in range(12): Image.fromarray(scenes[i].permute(1, 2, 0).numpy()[:, :40 - i]).save(folder/f'{i:02d}.png')
    (folder/'03.png').write_bytes((folder/'03.png').read_bytes()[:600])
    (tmp_path/'cached.py').write_text(CACHED)
    given = json.dumps({**TINY, 'data': str(folder), 'recipe': 'small', 'out': str(tmp_path/'run')})
    run = start('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(tmp_path/'cached.py'), given, str(tmp_path/'found'))
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 0, said
    first, second = (torch.load(tmp_path/f'found-{r}.pt', weights_only=False) for r in (0, 1))
    assert first['read'] >= 12 and second['read'] == 0 and '03.png' in first['why'] and first['why'] == second['why']
    assert (first['sizes'] == second['sizes']).all() and first['shared'] == second['shared'] == 1
    for i, (a, b) in enumerate(zip(first['found'], second['found'])):
        if i == 3: continue
        assert torch.equal(a, b) and torch.equal(a, scenes[i][:, :, :40 - i])
