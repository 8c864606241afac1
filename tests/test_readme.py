"""Every code block of the README does what it says, on data and lengths that fit a test."""
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
import pytest
from PIL import Image
from pixcon.objects import write_coco
from pixcon.scenes import Scenes

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.M | re.S)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.strip().splitlines()]
CLONES = [c for c in COMMANDS if c.startswith('git clone')]
INSTALLS = [c for c in COMMANDS if c.startswith('pip install')]    # .ci/run and its `times` execute these to the letter
PYTHON = [block for kind, block in BLOCKS if kind == 'python']
RUN = 'runs/scenes-sr-60ep-seed0'
TINY = ['--data', 'scenes', '--scenes', '16', '--batch', '8', '--epochs', '1', '--hidden', '16', '--dim', '8']


def call(command, folder, **more):
    "Runs a line of the README in a folder that has the project's nbs/; one thread, notebooks at the size of a test."
    environment = os.environ | dict(IN_TEST='1', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)) | more
    done = subprocess.run(['bash', '-c', command], cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder as after the default run: nbs/, a run, photos, labelled photos."
    folder = tmp_path_factory.mktemp('readme')
    (folder/'nbs').symlink_to(ROOT/'nbs')
    call(f"{sys.executable} -m pixcon.training {' '.join(TINY)} --out {RUN}", folder)
    (folder/'runs'/'NAME').symlink_to(Path(RUN).name)
    scenes = Scenes(16, 96)
    (folder/'runs'/'mine').symlink_to(Path(RUN).name)
    for part in ('path/to/train2017', 'path/to/images', 'pairs/train/images', 'pairs/val/images'):
        (folder/part).mkdir(parents=True)
        for i in range(8): Image.fromarray(scenes[i].permute(1, 2, 0).numpy()).save(folder/part/f'{i}.png')
    for part in ('pairs/train/labels', 'pairs/val/labels'):
        (folder/part).mkdir()
        for i in range(8): Image.fromarray(scenes.with_masks(i)[1].byte().numpy()).save(folder/part/f'{i}.png')
    write_coco(Scenes(8, 96), folder/'coco')
    write_coco(Scenes(4, 96, seed=1), folder/'coco', 'val')
    return folder


def at_test_size(command):
    "The same command with other lengths: two processes, few steps, the small data of `place`."
    command = re.sub(r'--nproc-per-node \d', '--standalone --nproc-per-node 2', command)
    command = command.replace('torchrun', f'{sys.executable} -m torch.distributed.run')
    command = re.sub(r'^python ', f'{sys.executable} ', command)
    if 'pixcon.training' in command:
        command = command.replace('--epochs 800', '--epochs 1') + ' --recipe small --batch 4 --size 32'
        command = command.replace('--data DIR', '--data path/to/train2017')
    if 'pixcon.segment' in command:
        command = command.replace('--data DIR', '--data pairs') + ' --recipe small --iterations 2 --labelled 4 --test 2'
    if 'pixcon.detect' in command:
        command = command.replace('--data DIR', '--data coco') + ' --recipe small --iterations 2 --labelled 4 --test 2'
    if 'train2017 -p epochs 800' in command:
        command += ' -p recipe small'
    command = command.replace('-p hours 8 -p out runs/mine', '-p recipe small -p out runs/fresh')
    command = command.replace('path/to/labelled', 'pairs')
    if 'study.ipynb' in command: command = command.replace('-p data DIR', '-p data path/to/train2017') + ' -p recipe small'
    return command


def test_there_are_blocks():
    assert len(INSTALLS) == 2 and len(CLONES) == 1 and len(COMMANDS) >= 8 and len(PYTHON) >= 2


@pytest.mark.skipif(not (ROOT/'.git').exists(), reason='the project is not under git here')
def test_clone(tmp_path):
    "The line clones the project's own address, here its own folder, and goes into it."
    settings = (ROOT/'settings.ini').read_text()
    user, repo = (re.search(rf'^{name} = (.*)$', settings, re.M)[1] for name in ('user', 'repo'))
    address = f'https://github.com/{user}/{repo}'
    line, = CLONES
    assert address in line.split()
    here = f'{shlex.quote(str(ROOT))} {repo}'
    assert call(line.replace(address, here) + ' && ls nbs/train.ipynb', tmp_path).strip() == 'nbs/train.ipynb'


def test_fifteen_lines():
    "As many as the heading says, and any README reader can count them."
    block, = re.findall(r'^## In fifteen lines$.*?^```python\n(.*?)^```$', README, re.M | re.S)
    assert len([line for line in block.splitlines() if line.strip()]) == 15


def test_no_telemetry():
    "No module of the package imports what opens web addresses."
    for path in (ROOT/'pixcon').glob('*.py'):
        found = re.findall(r'^\s*(?:import|from) (urllib|http|requests|httpx|aiohttp)\b', path.read_text(), re.M)
        assert not found, f'{path.name} imports {found}'


@pytest.mark.parametrize('command', [c for c in COMMANDS if c not in INSTALLS + CLONES])
def test_command(place, command): call(at_test_size(command), place)


@pytest.mark.parametrize('script', [block for kind, block in BLOCKS if kind == 'bash'])
def test_cluster(place, script):
    "The script for Slurm on one machine, with stand-ins for Slurm's own commands."
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    script = script.replace('--nnodes 2 --nproc-per-node 8', '--nnodes 1 --nproc-per-node 2').replace('29400', str(port))
    script = script.replace('--epochs 800', '--epochs 1 --recipe small --batch 4 --size 32')
    script = script.replace('--data DIR', '--data path/to/train2017').replace('torchrun', f'{sys.executable} -m torch.distributed.run')
    stand_ins = 'scontrol() { echo localhost; }\nsrun() { "$@"; }\nSLURM_JOB_ID=7\n'
    said = call(stand_ins + script, place, SLURM_JOB_NODELIST='localhost')
    assert 'on 2 x cpu; run folder runs/coco' in said


@pytest.mark.parametrize('code', PYTHON)
def test_python(place, code):
    small = code.replace('resnet50', 'resnet18').replace('size=224', 'size=64').replace('batch_size=64', 'batch_size=4')
    seen = '\nassert step == 1 and out["loss_dense"] > 0\nprint("tensors loaded")' if 'enumerate(DataLoader' in code else ''
    (place/'snippet.py').write_text(small + seen)
    said = call(f'{sys.executable} snippet.py', place)
    assert 'tensors loaded' in said
