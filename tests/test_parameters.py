"""What a person sees who mistypes a parameter."""
import subprocess
import sys
import pytest
import torch
from pixcon import distributed
from pixcon.config import PretrainConfig
from pixcon.distributed import launch, main
from pixcon.run import precision
from pixcon.training import Batches, Pretraining, configure, pretrain

TINY = dict(data='scenes', scenes=20, batch=4, epochs=1, size=32, hidden=16, dim=8, queue=12)

TABLE = [
    (dict(epochz=3), "unknown parameter 'epochz', did you mean 'epochs'? There are: data, out,"),
    (dict(zzz=3), "unknown parameter 'zzz'. There are: data, out,"),
    (dict(epochs='many'), "epochs must be a whole number, got 'many'"),
    (dict(epochs=2.5), 'epochs must be a whole number, got 2.5'),
    (dict(epochs=0), 'epochs must be at least 1, got 0'),
    (dict(epochs=True), 'epochs must be a whole number, got True'),
    (dict(batch=0), 'batch must be at least 2, got 0'),
    (dict(batch=1), 'batch must be at least 2, got 1'),
    (dict(batch=-8), 'batch must be at least 2, got -8'),
    (dict(batch=21), 'batch must be at most the number of images, 20, got 21'),
    (dict(accumulate=0), 'accumulate must be at least 1, got 0'),
    (dict(lr='fast'), "lr must be a number, got 'fast'"),
    (dict(lr=-.1), 'lr must be at least 1e-12, got -0.1'),
    (dict(lr=float('nan')), 'lr must be a number, got nan'),
    (dict(tau=0), 'tau must be at least 0.0001, got 0.0'),
    (dict(dense_weight=1.5), 'dense_weight must be from 0 to 1, got 1.5'),
    (dict(target_momentum=2), 'target_momentum must be from 0 to 1, got 2.0'),
    (dict(min_scale=0), 'min_scale must be from 0.0001 to 1, got 0.0'),
    (dict(matching='near'), "matching must be one of 'sim', 'coord', got 'near'"),
    (dict(reweight='perhaps'), "reweight must be on or off, got 'perhaps'"),
    (dict(optimizer='lars'), "optimizer must be one of 'sgd', 'adamw', got 'lars'"),
    (dict(queue=0), 'queue must be at least 1, got 0'),
    (dict(queue_start='full'), "queue_start must be one of 'empty', 'random', got 'full'"),
    (dict(overlap_rule='round'), "overlap_rule must be one of 'area', 'floor', got 'round'"),
    (dict(recipe='big'), "recipe must be one of 'auto', 'paper', 'small', got 'big'"),
    (dict(amp='int8'), "amp must be one of 'auto', 'off', 'bf16', 'fp16', got 'int8'"),
    (dict(cache='disk'), "cache must be one of 'auto', 'ram', 'device', 'off', got 'disk'"),
    (dict(cache_size=64), "cache_size is for images kept on the device: set cache to 'device', got 'auto'"),
    (dict(decode='gpu'), "decode must be one of 'cpu', 'device', got 'gpu'"),
    (dict(decode='device'), "decode 'device' is for files, the built-in scenes have none"),
    (dict(compile='yes'), "compile must be one of 'auto', 'on', 'off', got 'yes'"),
    (dict(seed=-1), 'seed must be from 0 to 4398046511104, got -1'),
    (dict(seed=10**18), 'seed must be from 0 to 4398046511104, got 1000000000000000000'),
    (dict(size=4), 'size must be at least 8, got 4'),
    (dict(workers=-2), 'workers must be at least -1, got -2'),
    (dict(save_minutes=-1), 'save_minutes must be at least 0, got -1.0'),
    (dict(data='/no/such/folder'), "'/no/such/folder' is no folder, no file, and no file matches it as a glob"),
    (dict(backbone=[1]), 'backbone must be a word, got [1]'),
]


@pytest.mark.parametrize('wrong,message', TABLE, ids=[f'{n}={v}' for wrong, _ in TABLE for n, v in wrong.items()])
def test_message(tmp_path, wrong, message):
    "The value, and what is allowed; nothing is written."
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as e:
        configure(**{**TINY, 'out': tmp_path/'run', **wrong})
    assert message in str(e.value)
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('wrong,message', [
    (dict(backbone='resnet19'), 'resnet19'),
    (dict(stride=3), 'stride'),
    (dict(size=8), 'a map of one cell, take a larger size or a smaller stride'),
])
def test_message_of_the_network(tmp_path, wrong, message):
    "Found when the network is made, before anything is written."
    with pytest.raises(ValueError, match=message):
        Pretraining(*configure(**{**TINY, **wrong}, out=tmp_path/'run'))
    assert not (tmp_path/'run').exists()


def test_out_that_is_a_file(tmp_path):
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file', tmp_path/'file'/'run'):
        with pytest.raises(ValueError, match="can't be written: .*file' is a file"): configure(**TINY, out=out)


def test_parts_must_be_equal():
    message = r"batch 10 can't be cut into 4 equal parts \(processes 2, accumulate 2\)"
    with pytest.raises(ValueError, match=message): Batches(20, 10, 1, parts=2, world=2)


def test_half_precision(monkeypatch):
    "fp16 without a GPU, bf16 on a GPU that lacks it."
    with pytest.raises(ValueError, match="amp 'fp16' needs a GPU"): precision('fp16', 'cpu')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: False)
    message = "amp 'bf16' is not supported by this GPU, use 'auto', 'fp16' or 'off'"
    with pytest.raises(ValueError, match=message): precision('bf16', 'cuda')


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    message = 'processes must be at most the number of GPUs, 2, got 3'
    with pytest.raises(ValueError, match=message): launch('pixcon.training', TINY, 3)


@pytest.mark.parametrize('processes', [0, -1, 2.5, 'two', True])
def test_number_of_processes(processes):
    message = f'processes must be a whole number of at least 1, got {processes!r}'
    with pytest.raises(ValueError, match=message): distributed.check_processes(processes)


def test_command_line(tmp_path):
    "The same messages, one line, no traceback; an unknown flag is refused."
    def call(*words): main('pixcon.training', PretrainConfig, pretrain, words)
    with pytest.raises(SystemExit, match='pixcon.training: epochs must be at least 1, got 0'):
        call('--data=scenes', '--epochs=0', f'--out={tmp_path}/run')
    with pytest.raises(SystemExit, match='2'): call('--epochz=3')


def test_help_describes_each_parameter():
    "python -m pixcon.training --help has the sentence of each field."
    said = subprocess.run([sys.executable, '-m', 'pixcon.training', '--help'], capture_output=True, text=True,
                          timeout=120, check=True).stdout
    said = ' '.join(said.split())
    for name, f in PretrainConfig.__dataclass_fields__.items():
        assert f'--{name} ' in said and ' '.join(f.metadata['why'].split()) in said, name


def test_queue_is_a_quarter_of_the_data():
    "The largest power of two that is at most a quarter of the images, at least a batch; what is given stays."
    def queue(scenes, batch, **given): return configure(data='scenes', scenes=scenes, batch=batch, **given)[0].queue
    assert [queue(256, 64), queue(1000, 64), queue(40, 16), queue(300, 64, queue=300)] == [64, 128, 16, 300]
    assert configure()[0].queue == 64
