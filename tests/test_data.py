"""Files found in the wild: what can be read is read right, what can't is named, counted and replaced."""
import os
import numpy as np
import pytest
import torch
from PIL import Image
from pixcon.augment import TwoViews
from pixcon.data import ImageList, doctor, read_image, refuse_bad, sample_photos, scan
from pixcon.training import Run, configure

PHOTO = sample_photos()['chelsea'][:, 40:140, 60:210].contiguous()                # (3,100,150)
PIL_PHOTO = Image.fromarray(PHOTO.permute(1, 2, 0).numpy())
TINY = dict(batch=10, epochs=2, size=32, hidden=16, dim=8, queue=20, recipe='small', log_steps=1, workers=0)


def close(path, other=PHOTO, apart=12): return (read_image(path).float() - other.float()).abs().mean() < apart


def test_odd_kinds_are_read_right(tmp_path):
    "CMYK, 16 bit, palette, alpha, grey, EXIF-rotated, a wrong ending, one pixel, a panorama, and names of all sorts."
    save = lambda image, name, *a, **k: (image.save(tmp_path/name, *a, **k), tmp_path/name)[1]
    grey = np.asarray(PIL_PHOTO.convert('L'))                                     # (100,150)
    as_grey = torch.from_numpy(grey.copy()).expand(3, -1, -1)
    assert close(save(PIL_PHOTO.convert('CMYK'), 'cmyk.jpg', quality=95))
    assert close(save(PIL_PHOTO.convert('CMYK'), 'cmyk.tif'))
    assert close(save(PIL_PHOTO.quantize(64), 'palette.png'))
    assert close(save(PIL_PHOTO.convert('RGBA'), 'alpha.png'), apart=1)
    assert close(save(PIL_PHOTO.convert('L'), 'grey.jpg', quality=95), as_grey)
    for name in ('deep.png', 'deep.tif'): assert close(save(Image.fromarray(grey.astype(np.uint16)*257), name), as_grey, 1)
    exif = Image.Exif(); exif[0x0112] = 6
    turned = save(PIL_PHOTO, 'turned.jpg', exif=exif, quality=95)
    assert read_image(turned).shape == (3, 150, 100) and close(turned, PHOTO.transpose(1, 2).flip(2))
    assert close(save(PIL_PHOTO, 'really a PNG.jpg', 'PNG'), apart=1) and close(save(PIL_PHOTO, 'really a JPEG.png', 'JPEG', quality=95))
    assert close(save(PIL_PHOTO, 'Füße 写真.webp', quality=95))
    save(PIL_PHOTO.resize((1, 1)), 'one.png'), save(PIL_PHOTO.resize((3000, 4)), 'panorama.png')
    images = ImageList(tmp_path)
    sizes, _ = scan(images)
    assert not images.bad and [tuple(s) for s in sizes] == [tuple(images[i].shape[1:]) for i in range(len(images))]
    views = TwoViews(images, size=16)
    assert all(views[e, i]['view'].shape == (2, 3, 16, 16) and views[e, i]['index'] == i for e in range(3) for i in range(len(images)))


def damaged(data, rng):
    "One way to spoil a file."
    kind, data = rng.integers(6), bytearray(data)
    at = int(rng.integers(len(data)))
    if kind == 0: return bytes(data[:at])                                         # cut off
    if kind == 1: return b''
    if kind == 2: return bytes(rng.integers(0, 256, len(data), dtype=np.uint8))   # noise
    if kind == 3: data[at:at+50] = bytes(50)                                      # a hole
    if kind == 4:
        for i in rng.integers(0, len(data), 20): data[i] = rng.integers(256)      # flipped bytes
    if kind == 5: data = data[at:] + data[:at]                                    # turned round
    return bytes(data)


def test_two_hundred_damaged_files(tmp_path):
    "Each is either an image or a ValueError with its name; never another error, and a view is made all the same."
    rng, good = np.random.default_rng(0), []
    for n, (ext, kwargs) in enumerate([('jpg', {}), ('png', {}), ('jpg', dict(progressive=True)), ('webp', {}), ('tif', {}), ('gif', {}), ('bmp', {})]):
        PIL_PHOTO.save(tmp_path/f'good{n}.{ext}', **kwargs); good.append(tmp_path/f'good{n}.{ext}')
    for k in range(200):
        source = good[k % len(good)]
        (tmp_path/f'bad{k:03d}{source.suffix}').write_bytes(damaged(source.read_bytes(), rng))
    images, unread = ImageList(tmp_path), 0
    scan(images)
    for i, path in enumerate(images.paths):
        try: assert images[i].dtype == torch.uint8 and images[i].shape[0] == 3
        except ValueError as e: unread += 1; assert path.name in str(e)
    assert 60 < unread < 200 and len(images.bad) <= unread
    views = TwoViews(images, size=16)
    drawn = [views[0, i] for i in range(len(images))]
    assert all(d['view'].shape == (2, 3, 16, 16) for d in drawn) and sum(d['asked'] != d['index'] for d in drawn) == unread


def folder(path, good, cut=0, empty=0):
    "A folder of good, cut off and empty JPEG files."
    path.mkdir()
    for i in range(good): PIL_PHOTO.rotate(7*i).save(path/f'good{i:03d}.jpg')
    whole = (path/'good000.jpg').read_bytes()
    for i in range(cut): (path/f'cut{i}.jpg').write_bytes(whole[:len(whole)//2])
    for i in range(empty): (path/f'empty{i}.jpg').write_bytes(b'')
    return path


def test_too_many_bad_files_stop_before_training(tmp_path):
    "The scan's list is in the message."
    with pytest.raises(ValueError, match=r"2 of 42 images can't be read, more than 1%:\n.*empty0.jpg: empty file"): configure(**TINY, data=folder(tmp_path/'a', 40, empty=2), out=tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_few_bad_files_are_replaced_and_listed(tmp_path):
    "One in a hundred, the first: the plan is made, the run ends, also after a stop, the file is listed once, and a second run has the same weights."
    runs = [Run(*configure(**TINY, data=folder(tmp_path/n, 104, cut=1), cache=cache, out=tmp_path/f'run {n}')) for n, cache in (('a', 'ram'), ('b', 'off'))]
    assert 'images/s' in runs[0].plan(processes=2)
    runs[0].start()
    for batch in runs[0].loader():
        runs[0].replaced([batch]); runs[0].log_line(runs[0].train_step(batch), 0.)
        if runs[0].step == 2: runs[0].save()
        if runs[0].step == runs[0].steps_per_epoch: break
    runs[0] = Run(*configure(**TINY, data=tmp_path/'a', cache='ram', out=tmp_path/'run a'))
    for run in runs: run.fit()
    for run in runs: assert (run.out/'unread.jsonl').read_text().count('cut0.jpg') == 1 and list(run.unread) == [0]
    for (n, a), b in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values()): assert torch.equal(a, b), n


def test_files_that_go_bad_stop_the_run(tmp_path):
    "Cut-off files pass the scan and are found while training; so is a folder that vanishes."
    run = Run(*configure(**TINY, data=folder(tmp_path/'a', 40, cut=3), cache='off', out=tmp_path/'run'))
    with pytest.raises(ValueError, match=r"images can't be read, more than 1%:\n.*cut\d.jpg"): run.fit()
    data = folder(tmp_path/'b', 40)
    run = Run(*configure(**TINY, data=data, cache='off', out=tmp_path/'run b'))
    for p in data.iterdir(): p.unlink()
    with pytest.raises(ValueError, match="cannot read image"): run.fit()


def test_links_and_copies(tmp_path, capsys):
    "A link to nowhere is no file, a copy is found."
    path = folder(tmp_path/'a', 3)
    (path/'copy.jpg').write_bytes((path/'good001.jpg').read_bytes()); (path/'link.jpg').symlink_to('nowhere.jpg')
    doctor(ImageList(path))
    assert '4 files, 4 of them readable by their beginning, 1 the same' in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_no_permission(tmp_path):
    "A file that may not be read is bad."
    path = folder(tmp_path/'a', 2); (path/'good000.jpg').chmod(0)
    images = ImageList(path); scan(images)
    assert list(images.bad) == [0]
