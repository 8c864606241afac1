"""Machines that are not this one: many cores, little shared memory, a GPU that is full, no compiler, fp16."""
import os
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize
from pixcon import augment, config, data, distributed, plan, run, training

PAIR = 2*3*224*224                                                 # bytes of two views
TINY = dict(data='scenes', scenes=8, batch=4, epochs=2, size=32, hidden=16, dim=8, queue=8, amp='off', workers=0)


def made(**given): return training.Pretraining(*training.configure(**{**TINY, 'out': tempfile.mkdtemp() + '/run'} | given))


@pytest.mark.parametrize('free', [64e6, 2e9, 500e9])
@pytest.mark.parametrize('cores,processes', [(2, 1), (16, 1), (96, 1), (96, 8)])
@pytest.mark.parametrize('batch', [8, 64, 512, 4096])
def test_batches_ahead_have_a_bound(monkeypatch, cores, processes, batch, free):
    "All processes together put at most 3 GB, and half of what is free, into /dev/shm; or it is said what to do."
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)))
    monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_bavail=int(free)//4096, f_frsize=4096))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    part = batch//processes*PAIR
    try: how = run.loading(-1, part)
    except ValueError as e:
        assert processes*part > min(3e9, free/2)
        assert '--shm-size' in str(e) and 'workers 0' in str(e) and f'{part/1e6:.0f} MB' in str(e)
        return
    assert 1 <= how['num_workers'] <= min(16, max(cores//processes - 1, 1))
    assert 1 <= how['prefetch_factor'] <= 4
    assert processes*how['num_workers']*how['prefetch_factor']*part <= min(3e9, free/2)


def test_loading_without_processes_asks_for_no_room(monkeypatch):
    monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_bavail=0, f_frsize=4096))
    assert run.loading(0, 1e9) == dict(num_workers=0)


def test_no_compiler(monkeypatch):
    "Under auto a machine without one goes on eager, with a warning; asked for, its error is shown."
    def none(f): raise RuntimeError('Failed to find C compiler. Please specify via CC\nand more')
    monkeypatch.setattr(torch, 'compile', none)
    with pytest.warns(UserWarning, match=r'left out \(Failed to find C compiler. Please specify via CC\)'):
        assert not training.compiles('cpu')


@pytest.mark.parametrize('choice,device,total,processes,works,wanted', [
    ('auto', 'cuda', 5000, 1, True, 2), ('auto', 'cuda', 5000, 1, False, 0), ('auto', 'cuda', 5000, 2, True, 0),
    ('auto', 'cuda', 4999, 1, True, 0), ('auto', 'cpu', 5000, 1, True, 0), ('on', 'cpu', 1, 1, False, 2),
    ('off', 'cuda', 5000, 1, True, 0)])
def test_when_to_compile(monkeypatch, choice, device, total, processes, works, wanted):
    "In long runs on one GPU that has a compiler, or if asked for."
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(self))
    monkeypatch.setattr(training, 'compiles', lambda device: works)
    monkeypatch.setattr(training, 'world', lambda: processes)
    own = made(compile='off')
    own.config.compile, own.device = choice, device
    own.prepare(total)
    assert len(compiled) == wanted


@pytest.mark.parametrize('choice', [True, False])
def test_deterministic(choice):
    made(deterministic=choice)
    assert torch.backends.cudnn.deterministic is choice and torch.backends.cudnn.benchmark is not choice


def test_copies_of_weights_are_kept_once():
    """ResNet-50 in bf16 at batch 512: 45 GB for the forward pass, and not 79 as if each image had its own weights.

    48.7 GB were tracked on fake tensors, with what the loss keeps."""
    own = made(recipe='paper', scenes=2048, batch=512, size=224, hidden=2048, dim=128, queue=512, amp='bf16')
    held, image = training.memory(own)
    assert 43e9 < 512*image < 48.7e9 and .3e9 < held < .8e9


def test_parts_that_fit_are_named(monkeypatch):
    own = made(batch=8, scenes=16)
    held, image = training.memory(own)
    assert training.too_large(own, room=held + 8*image) == ''
    assert training.too_large(own, room=held + 5*image).endswith('accumulate 2 would fit')
    assert training.too_large(own, room=held + 2*image).endswith('accumulate 4 would fit')
    assert training.too_large(own, room=held + image).endswith('no accumulate makes it fit')
    monkeypatch.setattr(training, 'free_memory', lambda device: held + 2*image)
    assert 'NOT ENOUGH MEMORY: a step of 8 images in 1 parts' in plan.plan(own)


def test_out_of_memory(monkeypatch):
    "A step that meets the end of a GPU's memory ends with the plan's sentence."
    own = made(batch=8, scenes=16)
    held, image = training.memory(own)
    def full(parts): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
    own.train_step = full
    monkeypatch.setattr(training, 'free_memory', lambda device: held + 5*image)
    with pytest.raises(MemoryError, match='accumulate 2 would fit'): own.fit()
    monkeypatch.setattr(training, 'free_memory', lambda device: None)
    with pytest.raises(MemoryError, match='does not fit into the memory: try accumulate 2'): own.fit()


@dataclass(kw_only=True)
class Tiny(config.RunConfig):
    "Parameters of a run that trains nothing."


def flags_of(folder, good, scale):
    "A run after steps with these flags, under a loss scaler with a scale."
    net = torch.nn.Linear(2, 1)
    scaler = torch.amp.GradScaler('cpu', init_scale=scale, enabled=scale > 0)
    scaler.scale(torch.zeros(1))                                   # makes the scale
    own = run.Run(Tiny(out=str(folder)), dict(model=net, scaler=scaler), total=100)
    own.begin()
    for k, flag in enumerate(good): own.advance(torch.tensor(flag), [f'image {k}'])
    own.check_gradients()
    return own


def test_search_for_a_scale_is_no_bad_image(tmp_path):
    "fp16 halves its scale until nothing overflows: such steps are counted and named, blame no image and stop no run."
    own = flags_of(tmp_path/'fp16', [False]*12 + [True], 65536.)
    assert (own.skipped, own.consecutive_skips) == (12, 0)
    lines = run.read_lines(tmp_path/'fp16'/'skipped.jsonl')
    assert [line['images'] for line in lines] == [[]]*12 and lines[0]['why'] == 'fp16 overflow'


@pytest.mark.parametrize('scale', [0, .5])
def test_with_nothing_to_halve_it_is_the_images(tmp_path, scale):
    "Without a scaler, or with one that has come below 1, ten in a row stop the run."
    own = flags_of(tmp_path/'few', [True, False, False], scale)
    assert (own.skipped, own.consecutive_skips) == (2, 2)
    assert run.read_lines(tmp_path/'few'/'skipped.jsonl')[0] == dict(step=2, images=['image 1'])
    with pytest.raises(FloatingPointError, match='10 steps in a row'): flags_of(tmp_path/'ten', [False]*10, scale)


def test_statistics_that_are_not_finite_are_put_back(tmp_path):
    net = torch.nn.BatchNorm1d(2)
    own = run.Run(Tiny(out=str(tmp_path/'run')), dict(model=net), total=100)
    own.begin()
    net.running_mean.fill_(torch.nan)
    own.guard_statistics(True)
    assert net.running_mean.tolist() == [0, 0]


@pytest.mark.parametrize('gpus', [0, 2])
def test_both_kinds_of_tensors_travel(monkeypatch, gpus):
    "On GPUs the group has gloo for what lies on the CPU, and each process is bound to its own GPU."
    said = []
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda n: said.append(n))
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda *a, **k: said.append((a, k)))
    distributed.join()
    wanted = [1, (('cpu:gloo,cuda:nccl',), dict(device_id=torch.device('cuda', 1)))] if gpus else [(('gloo',), {})]
    assert said == wanted


def test_hours_choose_the_epochs_once(tmp_path, monkeypatch, capsys):
    "As many epochs as fit are in config.json; the same command goes on with them, whatever the machine does by then."
    given = {n: v for n, v in TINY.items() if n != 'epochs'} | dict(out=str(tmp_path/'run'))
    monkeypatch.setattr(training, 'seconds_per_step', lambda *a: .5)
    c, images = training.configure(**given, hours=.1)
    assert c.epochs == int(.97*360/(.5*2)) and c.warmup_epochs == 2
    assert '0.500 s a step: 349 epochs in 0.1 hours' in capsys.readouterr().out
    own = training.Pretraining(c, images)
    own.begin()
    monkeypatch.setattr(training, 'seconds_per_step', lambda *a: .05)
    again, _ = training.configure(**given, hours=.1)
    assert again == c
    own.run.save()
    training.Pretraining(again, images).begin()                    # goes on


def test_hours_that_are_too_few(monkeypatch):
    given = {n: v for n, v in TINY.items() if n != 'epochs'}
    monkeypatch.setattr(training, 'seconds_per_step', lambda *a: 1000.)
    with pytest.raises(ValueError, match='one epoch takes 0.56 hours here, hours is 0.5'):
        training.configure(**given, hours=.5)
    with pytest.raises(ValueError, match='give hours or epochs, not both: got hours 8 and epochs 3'):
        training.configure(**given, hours=8, epochs=3)


def test_timed_steps_leave_nothing_behind(tmp_path):
    "Parts of a second a step, and no file where the run would be."
    c, images = training.configure(**TINY, out=str(tmp_path/'run'))
    assert 1e-3 < training.seconds_per_step(c, images, steps=3) < 20
    assert not list(tmp_path.iterdir())


def photos(folder, n=12, damaged=()):
    "A folder of noisy images of many sizes, some cut in half."
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        height, width = rng.integers(20, 90, 2)
        smooth = rng.integers(0, 256, (height//4 + 1, width//4 + 1, 3)).repeat(4, 0).repeat(4, 1)[:height, :width]
        noisy = np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder/f'{i:02d}.png')
        if i in damaged: (folder/f'{i:02d}.png').write_bytes((folder/f'{i:02d}.png').read_bytes()[:-200])
    return folder


class Listed:
    "Images from a list, an error in place of some."
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        if isinstance(self.images[i], str): raise ValueError(self.images[i])
        return self.images[i]


@pytest.mark.parametrize('size', [(8, 8), (32, 32), (224, 224), (48, 96)])
def test_views_cut_on_the_device(size):
    "Crops of one pixel to whole images, enlarged and reduced: torchvision's to one grey level, boxes and draws to the bit."
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (3, 50), (64, 48), (120, 200), (500, 333)]
    images = Listed([torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes])
    resident = augment.Resident(images)
    usual, ours = (augment.TwoViews(x, size, seed=3, pixels=x is images) for x in (images, resident))
    keys = [(epoch, i) for epoch in range(6) for i in range(len(images))]
    batch = torch.utils.data.default_collate([ours[k] for k in keys])
    view = resident.views(batch['index'], batch['box'], batch['flip'], size, at_once=7)
    for k, key in enumerate(keys):
        same = usual[key]
        assert all(torch.equal(batch[n][k], same[n]) for n in ('box', 'flip', 'draw'))
        assert (view[k].int() - same['view'].int()).abs().max() <= 1


def test_images_kept_smaller():
    "At a short side of 40 pixels, no image is enlarged, and boxes are drawn in what is kept."
    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 30), (80, 50), (50, 120)]
    images = Listed([torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes])
    resident = augment.Resident(images, short=40)
    assert resident.sizes.tolist() == [[40, 30], [64, 40], [40, 96]]
    small = [resize(x, size, antialias=True) for x, size in zip(images.images, resident.sizes.tolist())]
    usual, ours = augment.TwoViews(Listed(small), 24), augment.TwoViews(resident, 24, pixels=False)
    for i in range(3):
        sample = ours[2, i]
        view = resident.views(torch.tensor([i]), sample['box'][None], sample['flip'][None], (24, 24))[0]
        assert (view.int() - usual[2, i]['view'].int()).abs().max() <= 1


def test_images_that_cannot_be_kept(tmp_path):
    "The same image takes the place of one that can't be read, wherever images are kept, and it is listed."
    data, logs = photos(tmp_path/'data', 200, damaged=(7,)), []
    for cache in ('ram', 'device'):
        own = made(data=str(data), recipe='small', batch=20, cache=cache, out=str(tmp_path/cache))
        own.fit()
        logs.append([line['image'][-6:] for line in run.read_lines(tmp_path/cache/'unread.jsonl')])
    assert logs == [['07.png']]*2


@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_that_keeps_its_images_on_the_device(tmp_path, workers):
    "Its network gets what it would get otherwise, but for a grey level, and a run may change from one to the other."
    data = photos(tmp_path/'data')
    given = dict(data=str(data), recipe='small', batch=6, epochs=4, save_epochs=1, workers=workers)
    off, device = (made(**given, cache=cache, out=str(tmp_path/cache)) for cache in ('off', 'device'))
    for (usual,), (ours,) in zip(off.steps(), device.steps()):
        assert 'view' not in ours and all(torch.equal(t, usual[n]) for n, t in ours.items())
        (x, *boxes), (y, *same) = off.views(usual), device.views(ours)
        assert all(map(torch.equal, boxes, same))
        assert 0 < (x - y).abs().mean() < .02                      # of values with deviation 1
    device.fit()
    made(**given | dict(epochs=6), cache='off', out=str(tmp_path/'device')).fit()
    assert [line['step'] for line in run.read_log(tmp_path/'device')] == [2, 4, 6, 8, 10, 12]


def jpegs(folder, n=12):
    "Photos as JPEG; one turned by EXIF, one grey, one PNG, one cut off behind its header."
    photos(folder, n)
    for i, png in enumerate(sorted(folder.glob('*.png'))):
        if i == 3: continue
        image, exif = Image.open(png), Image.Exif()
        if i == 4: exif[0x0112] = 6
        if i == 5: image = image.convert('L')
        image.save(png.with_suffix('.jpg'), exif=exif)
        png.unlink()
    damaged = folder/'07.jpg'
    damaged.write_bytes(damaged.read_bytes()[:-200])
    return folder


@pytest.mark.filterwarnings('ignore:a batch is decoded by the CPU')
@pytest.mark.parametrize('workers', [0, 2])
def test_files_decoded_on_the_device(tmp_path, workers):
    "The network gets what it would get otherwise, but for grey levels; where a file is damaged, exactly that."
    given = dict(data=str(jpegs(tmp_path/'data')), recipe='small', batch=6, epochs=4, workers=workers, cache='off')
    usual, ours = (made(**given, decode=decode, out=str(tmp_path/decode)) for decode in ('cpu', 'device'))
    assert {file.ndim for file in (data.encoded(p) for p in ours.images.paths)} == {1, 3}
    replaced = 0
    for (a,), (b,) in zip(usual.steps(), ours.steps()):
        assert all(torch.equal(b[n], a[n]) for n in ('box', 'flip', 'draw', 'index', 'asked'))
        damaged = 7 in a['asked'].tolist()
        assert a['index'].equal(a['asked']) != damaged
        assert (a['view'].int() - b['view'].int()).abs().max() <= (0 if damaged else 1)
        replaced += damaged
        for one in (usual, ours): one.run.step += 1
    assert replaced == 4 and ours.run.step == 8


def test_a_file_that_changed_since_the_scan(tmp_path):
    "Boxes that were drawn in a larger image are not cut out of the smaller one."
    given = dict(data=str(jpegs(tmp_path/'data')), recipe='small', batch=6, decode='device', out=str(tmp_path/'run'))
    images = made(**given).images
    views = augment.FileViews(images, size=16)
    image = Image.open(images.paths[0])
    image.resize((image.width//4, image.height//4)).save(images.paths[0])
    batch = augment.collate_files([views[0, i] for i in (0, 1)])
    with pytest.raises(ValueError, match='smaller than its file says'):
        augment.cut_files(batch, 16, data.device_decoder('cpu'), 'cpu')


def test_a_batch_that_the_device_cannot_decode_is_named(tmp_path):
    own = made(data=str(jpegs(tmp_path/'data')), recipe='small', batch=12, epochs=1, decode='device', out=str(tmp_path/'run'))
    with pytest.warns(UserWarning, match='a batch is decoded by the CPU, cpu could not'): next(own.steps())


def test_batches_of_files_are_one_tensor_each(tmp_path):
    "Few open files, however many images; and their bytes bound how many are prepared."
    own = made(data=str(jpegs(tmp_path/'data')), recipe='small', batch=12, decode='device', out=str(tmp_path/'run'))
    views = augment.FileViews(own.images, size=16)
    batch = augment.collate_files([views[0, i] for i in range(7)])
    assert sum(map(torch.is_tensor, batch.values())) == len(batch) - 1 and isinstance(batch['shape'], list)
    sizes = [p.stat().st_size for p in own.images.paths]
    assert training.item_bytes(own) == np.mean(sizes)


def test_no_decoder_for_the_device():
    "The message names each decoder's reason and the way out."
    with pytest.raises(ValueError, match="no decoder for JPEG files works on meta .*torchvision: .*set decode to 'cpu'"):
        data.device_decoder('meta')


@pytest.mark.parametrize('given, kept', [(dict(cache='device'), True), (dict(decode='device', cache='off'), False)])
def test_the_plan_counts_what_the_device_cuts(tmp_path, given, kept):
    "Views made on the device are a part of the step, and nothing is read where images are kept."
    own = made(data=str(photos(tmp_path/'data')), recipe='small', batch=6, **given, out=str(tmp_path/'run'))
    cost = plan.run_cost(own)
    assert cost['cut'] > 0 and (cost['read'] == 0) == kept
    parts = ('network', 'loss', 'augment', 'update', 'cut', 'read')
    assert cost['step'] == pytest.approx(sum(cost[n] for n in parts))


def test_the_plan_says_whether_images_fit(tmp_path):
    "In bytes, with each process's copy on a CPU."
    own = made(data=str(photos(tmp_path/'data')), recipe='small', batch=6, out=str(tmp_path/'run'))
    size = 3*int(own.images.sizes.prod(1).sum())
    for free, processes, fits in ((size, 1, True), (size - 1, 1, False), (size, 2, False), (2*size, 2, True)):
        assert ('does not fit' in plan.room_for_images(own, 0, processes, free)) != fits
    assert 'does not fit' in plan.room_for_images(own, 1, 1, size)
    own.config.cache = 'device'
    assert plan.room_for_images(own, 0, 1, size - 1).startswith('NOT ENOUGH MEMORY for cache device')
