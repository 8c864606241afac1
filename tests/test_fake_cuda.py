"""Whole training steps on fake CUDA tensors: everything on its device, nothing waits for it, no GPU needed."""
import json
import os
import subprocess
import sys

import pytest
import torch

import fake_cuda

STEPS = ['', 'amp=fp16', 'amp=off', 'accumulate=2', 'optimizer=adamw', 'matching=coord',
         'matching=coord max_dist=0.7', 'matching=coord accumulate=2', 'dense_weight=0', 'dense_weight=1',
         'dense_start=0.5', 'reweight=off overlap_rule=floor', 'deterministic=on',
         'cache=device scenes=128 queue=128', 'cache=device scenes=128 queue=128 cache_size=64',
         'backbone=shufflenet_v2_x1_0 stride=8 size=64', 'backbone=convnext_tiny amp=off']
OTHERS = ['norms', 'files', 'log', 'resume', 'resume amp=off', 'segment', 'segment amp=off', 'segment head=deeplabv3 rate=2']

absent = fake_cuda.missing()
pytestmark = pytest.mark.skipif(bool(absent), reason=f"this torch, {torch.__version__}, has no "
                                f"{', '.join(absent)}; checked with {fake_cuda.CHECKED_WITH}")


PLANTED = {
    'host-index': 'two devices', 'copy-of-a-number': 'blocks', 'read-loss': '_local_scalar_dense', 'blocking-copy': 'blocks',
    'mask': 'by a mask', 'momentum-layout': 'fused kernel refuses', 'queue-on-the-host': 'two devices'}
CASES = [f'step {c}'.strip() for c in STEPS] + OTHERS
WITH_BUG = {bug: f'step matching=coord max_dist=.7 plant={bug}' for bug in PLANTED}


@pytest.fixture(scope='module')
def said():
    "What each case says, all of them in one process that believes in a GPU."
    environment = {n: v for n, v in os.environ.items() if n != 'PIXCON_AMP'}
    script = fake_cuda.__file__.replace('fake_cuda', 'fake_cuda_steps')
    command = [sys.executable, script, *CASES, *WITH_BUG.values()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('case', CASES)
def test_a_step_stays_on_its_device_and_never_waits(said, case): assert said[case] == 'well', said[case]


@pytest.mark.parametrize('bug', PLANTED)
def test_a_planted_bug_is_seen(said, bug): assert PLANTED[bug] in said[WITH_BUG[bug]], said[WITH_BUG[bug]]
