"""Files found in the wild: what can be read is read right, what can't is named, counted and replaced."""
import os
import subprocess
import sys
import types
import warnings
from io import BytesIO
import numpy as np
import pytest
import torch
from PIL import Image
from pixcon import data
from pixcon.augment import TwoViews
from pixcon.data import ImageList, decoders, doctor, read_image, sample_photos, scan
from pixcon.plan import plan
from pixcon.training import Pretraining, configure

PHOTO = sample_photos()['chelsea'][:, 40:140, 60:210].contiguous()     # (3,100,150)
PIL_PHOTO = Image.fromarray(PHOTO.permute(1, 2, 0).numpy())
GREY = np.asarray(PIL_PHOTO.convert('L'))                              # (100,150)
TINY = dict(batch=10, epochs=2, size=32, hidden=16, dim=8, queue=20,
            recipe='small', log_steps=1, workers=0)


def close(path, other=PHOTO, apart=12):
    "The file at path holds the other image, to within a mean distance."
    return (read_image(path).float() - other.float()).abs().mean() < apart


def exif(orientation):
    "EXIF data that say how the camera was held."
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def test_odd_kinds_are_read_right(tmp_path):
    """CMYK, 16 bit, palette, alpha, grey, EXIF-rotated, a wrong ending, one pixel, a panorama,
    and names of all sorts."""
    def save(image, name, *args, **kwargs):
        image.save(tmp_path/name, *args, **kwargs)
        return tmp_path/name

    as_grey = torch.from_numpy(GREY.copy()).expand(3, -1, -1)
    assert close(save(PIL_PHOTO.convert('CMYK'), 'cmyk.jpg', quality=95))
    assert close(save(PIL_PHOTO.convert('CMYK'), 'cmyk.tif'))
    assert close(save(PIL_PHOTO.quantize(64), 'palette.png'))
    assert close(save(PIL_PHOTO.convert('RGBA'), 'alpha.png'), apart=1)
    assert close(save(PIL_PHOTO.convert('L'), 'grey.jpg', quality=95), as_grey)
    for name in ('deep.png', 'deep.tif'):
        assert close(save(Image.fromarray(GREY.astype(np.uint16)*257), name), as_grey, 1)
    turned = save(PIL_PHOTO, 'turned.jpg', exif=exif(6), quality=95)
    assert read_image(turned).shape == (3, 150, 100)
    assert close(turned, PHOTO.transpose(1, 2).flip(2))
    save(PIL_PHOTO, 'turned.png', exif=exif(6))
    save(PIL_PHOTO, 'turned.webp', exif=exif(6))
    assert close(save(PIL_PHOTO, 'really a PNG.jpg', 'PNG'), apart=1)
    assert close(save(PIL_PHOTO, 'really a JPEG.png', 'JPEG', quality=95))
    assert close(save(PIL_PHOTO, 'Füße 写真.webp', quality=95))
    save(PIL_PHOTO.resize((1, 1)), 'one.png')
    save(PIL_PHOTO.resize((3000, 4)), 'panorama.png')

    images = ImageList(tmp_path)
    sizes, _ = scan(images)
    assert not images.bad
    assert [tuple(s) for s in sizes] == [tuple(images[i].shape[1:]) for i in range(len(images))]
    views = TwoViews(images, size=16)
    for e in range(3):
        for i in range(len(images)):
            assert views[e, i]['view'].shape == (2, 3, 16, 16)
            assert views[e, i]['index'] == i


def jpeg_and_png():
    "Name and bytes of files of the two kinds that the fast decoders read."
    def encode(image, kind, **kwargs):
        file = BytesIO()
        image.save(file, kind, **kwargs)
        return file

    grey, palette, alpha = (PIL_PHOTO.convert(m) for m in ('L', 'P', 'RGBA'))
    alpha.putalpha(Image.fromarray(GREY))
    deep = Image.fromarray(GREY.astype(np.uint16)*200 + 77)
    jpeg = dict(plain=encode(PIL_PHOTO, 'JPEG'),
                progressive=encode(PIL_PHOTO, 'JPEG', progressive=True),
                full_colour=encode(PIL_PHOTO, 'JPEG', subsampling=0, quality=95),
                grey=encode(grey, 'JPEG'),
                cmyk=encode(PIL_PHOTO.convert('CMYK'), 'JPEG'))
    png = dict(plain=encode(PIL_PHOTO, 'PNG'),
               grey=encode(grey, 'PNG'),
               one_bit=encode(PIL_PHOTO.convert('1'), 'PNG'),
               palette=encode(palette, 'PNG', transparency=3),
               alpha=encode(alpha, 'PNG'),
               grey_alpha=encode(alpha.convert('LA'), 'PNG'),
               sixteen_bits=encode(deep, 'PNG'))
    for o in range(1, 9):
        jpeg[f'exif {o}'] = encode(PIL_PHOTO, 'JPEG', exif=exif(o))
        png[f'exif {o}'] = encode(PIL_PHOTO, 'PNG', exif=exif(o))
    return dict(jpeg=jpeg, png=png)


@pytest.mark.parametrize('name', ('torchcodec', 'torchvision', 'Pillow'))
def test_decoders_agree(name):
    "Each decoder that is installed gives Pillow's pixels to within 2 grey levels, and no warning."
    if name not in decoders():
        pytest.skip(f"{name} isn't installed, or can't decode with this torch")
    decode = decoders()[name]
    files = jpeg_and_png()
    if name == 'torchvision':                                          # may never see a PNG
        for file in files.pop('png').values():
            with pytest.raises(ValueError, match='another kind'):
                decode(file)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kind, several in files.items():
            for what, file in several.items():
                wanted = data._decode_with_pillow(file)                # (3,H,W)
                found = decode(file)
                assert found.dtype == torch.uint8, (kind, what)
                assert found.shape == wanted.shape, (kind, what)
                assert (found.int() - wanted.int()).abs().max() <= 2, (kind, what)


def test_pillow_decodes_what_was_saved():
    "The one that the others are compared to: the pixels of a PNG, turned by each EXIF flag."
    files = jpeg_and_png()['png']
    turns = {1: PHOTO, 2: PHOTO.flip(2), 3: PHOTO.flip(1, 2), 4: PHOTO.flip(1),
             5: PHOTO.mT, 6: PHOTO.mT.flip(2), 7: PHOTO.mT.flip(1, 2), 8: PHOTO.mT.flip(1)}
    for o, wanted in turns.items():
        assert torch.equal(data._decode_with_pillow(files[f'exif {o}']), wanted), o


@pytest.mark.parametrize('fault', ('missing', 'too old', "can't decode"))
def test_a_torchcodec_that_fails_is_passed_over(fault, tmp_path, monkeypatch, capfd):
    "Silently, and it is tried once in a process, not once for each image."
    asked = []

    def fail(*args, **kwargs):
        asked.append(1)
        raise RuntimeError("Could not load libtorchcodec")

    module = types.ModuleType('torchcodec.decoders')                   # too old: has no decode_image
    if fault == "can't decode":
        module.decode_image = fail
    monkeypatch.setitem(sys.modules, 'torchcodec', types.ModuleType('torchcodec'))
    monkeypatch.setitem(sys.modules, 'torchcodec.decoders', None if fault == 'missing' else module)
    decoders.cache_clear()
    try:
        for ext in ('jpg', 'png'):
            PIL_PHOTO.save(tmp_path/f'photo.{ext}')
            for _ in range(3):
                assert close(tmp_path/f'photo.{ext}')
        assert 'torchcodec' not in decoders()
        assert len(asked) == (fault == "can't decode")
        assert not any(capfd.readouterr())
    finally:
        decoders.cache_clear()


def test_without_torchvisions_decoders(tmp_path, monkeypatch):
    "They will be removed: Pillow takes over."
    monkeypatch.setitem(sys.modules, 'torchvision.io', None)
    monkeypatch.setitem(sys.modules, 'torchcodec.decoders', None)
    decoders.cache_clear()
    try:
        assert list(decoders()) == ['Pillow']
        PIL_PHOTO.save(tmp_path/'photo.jpg', quality=95)
        assert close(tmp_path/'photo.jpg')
    finally:
        decoders.cache_clear()


# Reads the files of a folder from a number on and says what became of each. A child does it, since
# a decoder may end the process; it may take 1 GB more than what the imports have mapped.
READ_ALL = """
import resource
import sys
from pathlib import Path
from pixcon.data import ImageList, read_image, scan

limit = resource.getpagesize()*int(Path('/proc/self/statm').read_text().split()[0]) + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
images = ImageList(sys.argv[1])
scan(images)
for path in images.paths[int(sys.argv[2]):]:
    print(path.name, end=' ', flush=True)
    try:
        shape = tuple(read_image(path).shape)
        print('read' if len(shape) == 3 and shape[0] == 3 else f'has shape {shape}')
    except ValueError as e:
        print('refused' if path.name in str(e) else f'refused without its name: {e}')
    except BaseException as e:
        print(f'raised {type(e).__name__}: {e}')
"""


def read_in_children(folder):
    "What became of each file: a list of (name, 'read', 'refused' or what went wrong)."
    became, number = [], len(list(folder.iterdir()))
    while len(became) < number:
        child = subprocess.run([sys.executable, '-c', READ_ALL, folder, str(len(became))],
                               capture_output=True, text=True, timeout=100)
        lines = [tuple(line.split(' ', 1)) for line in child.stdout.splitlines()]
        if child.returncode:
            assert lines, child.stderr                                 # died before the first file
            lines[-1] = (lines[-1][0], f'ended the process with status {child.returncode}')
        became += lines
    return became


@pytest.mark.skipif(sys.platform != 'linux', reason='the limit of memory is set as Linux wants it')
@pytest.mark.parametrize('kind', ('png', 'jpg', 'gif', 'webp', 'tif', 'bmp'))
def test_flipped_bits_end_no_process(kind, tmp_path):
    """One bit is turned in each of 200 files, for 40 of them in the first 64 bytes:
    an image, or ValueError with the name."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8))
    kwargs = dict(exif=exif(6)) if kind in ('jpg', 'webp') else {}
    noise.save(tmp_path/f'noise.{kind}', **kwargs)
    PIL_PHOTO.save(tmp_path/f'photo.{kind}', **kwargs)
    whole = [(tmp_path/f'{n}.{kind}').read_bytes() for n in ('noise', 'photo')]
    (tmp_path/'flipped').mkdir()
    for k in range(200):
        spoilt = bytearray(whole[k % 2])
        at = int(rng.integers(64 if k % 5 == 0 else len(spoilt)))
        spoilt[at] ^= 1 << int(rng.integers(8))
        (tmp_path/'flipped'/f'{k:03d}.{kind}').write_bytes(spoilt)

    became = read_in_children(tmp_path/'flipped')
    assert len(became) == 200
    assert not [b for b in became if b[1] not in ('read', 'refused')]
    if kind == 'png':                                                  # has check sums
        assert sum(what == 'refused' for _, what in became) > 190


def test_a_photo_larger_than_the_memory_is_refused(tmp_path):
    "A JPEG that says it has 65,000 x 65,000 pixels: no death, a ValueError with its name."
    PIL_PHOTO.save(tmp_path/'photo.jpg')
    spoilt = bytearray((tmp_path/'photo.jpg').read_bytes())
    at = spoilt.index(b'\xff\xc0') + 5                                 # height and width, 2 bytes each
    spoilt[at:at + 4] = (65_000).to_bytes(2, 'big')*2
    (tmp_path/'photo.jpg').write_bytes(spoilt)
    assert read_in_children(tmp_path) == [('photo.jpg', 'refused')]


def damaged(whole, rng):
    "One way to spoil a file."
    kind = rng.integers(6)
    spoilt = bytearray(whole)
    at = int(rng.integers(len(spoilt)))
    if kind == 0:                                                      # cut off
        return bytes(spoilt[:at])
    if kind == 1:
        return b''
    if kind == 2:                                                      # noise
        return bytes(rng.integers(0, 256, len(spoilt), dtype=np.uint8))
    if kind == 3:                                                      # a hole
        spoilt[at:at + 50] = bytes(50)
    if kind == 4:                                                      # changed bytes
        for i in rng.integers(0, len(spoilt), 20):
            spoilt[i] = rng.integers(256)
    if kind == 5:                                                      # turned round
        spoilt = spoilt[at:] + spoilt[:at]
    return bytes(spoilt)


def test_two_hundred_damaged_files(tmp_path):
    "Each is either an image or a ValueError with its name; a view is made all the same."
    rng = np.random.default_rng(0)
    good = []
    kinds = [('jpg', {}), ('png', {}), ('jpg', dict(progressive=True)), ('webp', {}),
             ('tif', {}), ('gif', {}), ('bmp', {})]
    for n, (ext, kwargs) in enumerate(kinds):
        good.append(tmp_path/f'good{n}.{ext}')
        PIL_PHOTO.save(good[-1], **kwargs)
    for k in range(200):
        source = good[k % len(good)]
        (tmp_path/f'bad{k:03d}{source.suffix}').write_bytes(damaged(source.read_bytes(), rng))

    images = ImageList(tmp_path)
    scan(images)
    unread = 0
    for i, path in enumerate(images.paths):
        try:
            assert images[i].dtype == torch.uint8 and images[i].shape[0] == 3
        except ValueError as e:
            unread += 1
            assert path.name in str(e)
    assert 60 < unread < 200 and len(images.bad) <= unread

    views = TwoViews(images, size=16)
    drawn = [views[0, i] for i in range(len(images))]
    assert all(d['view'].shape == (2, 3, 16, 16) for d in drawn)
    assert sum(d['asked'] != d['index'] for d in drawn) == unread


def test_a_loop_of_links_and_a_closed_folder(tmp_path, monkeypatch):
    "Each file once, by its shortest name; what can't be opened is named."
    for sub in ('a', 'a/b', 'shut', '.hidden'):
        (tmp_path/sub).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path/sub/'0.png')
    (tmp_path/'a'/'b'/'again').symlink_to(tmp_path)
    names = lambda source: [str(p.relative_to(tmp_path)) for p in ImageList(source).paths]
    assert names(f'{tmp_path}/**/*.png') == names(tmp_path) == ['a/0.png', 'a/b/0.png', 'shut/0.png']
    own = os.scandir
    def scandir(path):
        if str(path).endswith('shut'): raise PermissionError(13, 'Permission denied', str(path))
        return own(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.warns(UserWarning, match="shut' is left out: Permission denied"): assert names(tmp_path) == ['a/0.png', 'a/b/0.png']


def test_sixteen_bits_are_read_as_eight(tmp_path):
    "Of PNG, TIFF and PGM alike; 32 bits are refused, since nobody knows what is white."
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for kind in ('png', 'tif'): Image.fromarray(deep).save(tmp_path/f'a.{kind}')
    (tmp_path/'a.pgm').write_bytes(b'P5 32 32 65535 ' + deep.astype('>u2').tobytes())
    for kind in ('png', 'tif', 'pgm'):
        error = read_image(tmp_path/f'a.{kind}')[1].int() - torch.tensor(deep >> 8).int()
        assert error.abs().max() <= 1, kind  # torchcodec rounds, torchvision and Pillow cut off
    for values in (deep.astype(np.float32)/65535, deep.astype(np.int32)):
        Image.fromarray(values).save(tmp_path/'b.tif')
        with pytest.raises(ValueError, match='b.tif.*pixels of 32 bits'): read_image(tmp_path/'b.tif')


@pytest.mark.parametrize('kind', ['jpg', 'png', 'tif', 'webp'])
def test_scan_tells_the_size_of_what_is_read(tmp_path, kind):
    "Whichever way EXIF turns an image."
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new('RGB', (30, 20)).save(tmp_path/f'{turn}.{kind}', exif=exif)
    images = ImageList(tmp_path)
    assert scan(images)[0].tolist() == [list(images[i].shape[1:]) for i in range(8)] == [[20, 30]]*4 + [[30, 20]]*4


def test_scan_leaves_the_warnings_alone(tmp_path):
    "Its threads share one filter: what a process wants to hear of is the same before and after."
    folder(tmp_path/'a', 40)
    before = list(warnings.filters)
    scan(ImageList(tmp_path/'a'))
    assert list(warnings.filters) == before


def folder(path, good, cut=0, empty=0):
    "A folder of good, cut off and empty JPEG files."
    path.mkdir()
    for i in range(good):
        PIL_PHOTO.rotate(7*i).save(path/f'good{i:03d}.jpg')
    whole = (path/'good000.jpg').read_bytes()
    for i in range(cut):
        (path/f'cut{i}.jpg').write_bytes(whole[:len(whole)//2])
    for i in range(empty):
        (path/f'empty{i}.jpg').write_bytes(b'')
    return path


def test_too_many_bad_files_stop_before_training(tmp_path):
    "The scan's list is in the message."
    wanted = r"2 of 42 images can't be read, more than 1%:\n.*empty0.jpg: empty file"
    bad = folder(tmp_path/'a', 40, empty=2)
    with pytest.raises(ValueError, match=wanted):
        configure(**TINY, data=bad, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_few_bad_files_are_replaced_and_listed(tmp_path):
    """One in a hundred, the first: the plan is made, the run ends, also after a stop,
    the file is listed once, and a second run has the same weights."""
    runs = []
    for n, cache in (('a', 'ram'), ('b', 'off')):
        images = folder(tmp_path/n, 104, cut=1)
        runs.append(Pretraining(*configure(**TINY, data=images, cache=cache, out=tmp_path/f'run {n}')))
    first = runs[0]
    assert 'images/s' in plan(first, processes=2)
    first.begin()
    for parts in first.steps():
        first.note_unread(parts)
        first.run.report(first.log_line(first.train_step(parts)))
        if first.run.step == 2:
            first.run.save()
        if first.run.step == first.steps_per_epoch:
            break
    runs[0] = Pretraining(*configure(**TINY, data=tmp_path/'a', cache='ram', out=tmp_path/'run a'))
    for run in runs:
        run.fit()
    for run in runs:
        assert (run.run.out/'unread.jsonl').read_text().count('cut0.jpg') == 1
        assert list(run.unread) == [0]
    a, b = (run.model.state_dict() for run in runs)
    for n in a:
        assert torch.equal(a[n], b[n]), n


def test_files_that_go_bad_stop_the_run(tmp_path):
    "Cut-off files pass the scan and are found while training; so is a folder that vanishes."
    bad = folder(tmp_path/'a', 40, cut=3)
    run = Pretraining(*configure(**TINY, data=bad, cache='off', out=tmp_path/'run'))
    wanted = r"images can't be read, more than 1%:\n.*cut\d.jpg"
    with pytest.raises(ValueError, match=wanted):
        run.fit()
    vanishing = folder(tmp_path/'b', 40)
    run = Pretraining(*configure(**TINY, data=vanishing, cache='off', out=tmp_path/'run b'))
    for p in vanishing.iterdir():
        p.unlink()
    with pytest.raises(ValueError, match="cannot read image"):
        run.fit()


def test_links_and_copies(tmp_path, capsys):
    "A link to nowhere is no file, a copy is found."
    path = folder(tmp_path/'a', 3)
    (path/'copy.jpg').write_bytes((path/'good001.jpg').read_bytes())
    (path/'link.jpg').symlink_to('nowhere.jpg')
    doctor(ImageList(path))
    wanted = '4 files, 4 of them readable by their beginning, 1 the same'
    assert wanted in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_no_permission(tmp_path):
    "A file that may not be read is bad."
    path = folder(tmp_path/'a', 2)
    (path/'good000.jpg').chmod(0)
    images = ImageList(path)
    scan(images)
    assert list(images.bad) == [0]
