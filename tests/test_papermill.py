"""train.ipynb as a user runs it: headless, with parameters, right and wrong ones."""
import json
import os
import subprocess
import time
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
SMALL = dict(scenes=16, batch=8, epochs=2, hidden=32, dim=16)


def papermill(folder, *more, timeout=300, **parameters):
    "Runs the training notebook in a folder; returns the finished process."
    flags = [a for n, v in parameters.items() for a in ('-p', n, str(v))]
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')}
    command = ['papermill', ROOT/'nbs'/'train.ipynb', 'out.ipynb', '--no-progress-bar', *more, *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def test_trains_and_continues(tmp_path):
    "From any directory; the override takes effect; all files are there; a second run continues; nothing is left in nbs/."
    there = lambda: sorted(p.name for p in (ROOT/'nbs').iterdir() if not p.name.startswith('.'))
    before = there()
    first = papermill(tmp_path, '--log-output', **SMALL)
    assert first.returncode == 0, first.stderr[-3000:]
    assert 'step 4/4, epoch 2.0: loss' in first.stderr              # what --log-output passes on
    run, = (tmp_path/'runs').iterdir()
    assert run.name == 'scenes-sr-2ep-seed0'
    files = {'backbone.safetensors', 'boards', 'checkpoint.pt', 'config.json', 'figures', 'log.jsonl', 'summary.json'}
    assert {p.name for p in run.iterdir()} == files
    pictures = {'views.png', 'loss.png', 'shortcut.png', 'health.png', 'boards.png', 'probe.png'}
    assert {p.name for p in (run/'figures').iterdir()} == pictures
    assert json.loads((run/'config.json').read_text())['epochs'] == 2
    summary = json.loads((run/'summary.json').read_text())
    assert summary['steps'] == 4 and summary['images_per_s'] > 0
    assert 0 < summary['probe_random'] < 100 and 0 < summary['probe_trained'] < 100
    log = (run/'log.jsonl').read_text()
    second = papermill(tmp_path, **{**SMALL, 'epochs': 4}, out=run)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (run/'log.jsonl').read_text().startswith(log)
    assert json.loads((run/'summary.json').read_text())['steps'] == 8
    assert there() == before


@pytest.mark.parametrize('wrong,message', [
    (dict(epochz=8), "unknown parameter 'epochz', did you mean 'epochs'?"),
    (dict(epochs='many'), "epochs must be a whole number, got 'many'"),
    (dict(matching='near'), "matching must be one of 'sim', 'coord', got 'near'"),
    (dict(data='/no/such/folder'), "'/no/such/folder' is no folder"),
])
def test_wrong_parameter_stops_at_once(tmp_path, wrong, message):
    "Within seconds, before any work, with a message that names it."
    start = time.time()
    stopped = papermill(tmp_path, timeout=120, **wrong)
    assert stopped.returncode != 0 and message in stopped.stderr
    assert time.time() - start < 90
    assert not (tmp_path/'runs').exists()
