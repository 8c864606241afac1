"""The readers of files against files that nobody checked: damaged and made up at random, read in child processes.

    python tests/fuzz_readers.py --seconds 30            # of each reader, prints a table; about eight minutes
    python tests/fuzz_readers.py --only coco voc --keep /tmp/cases

No part of the test suite: what once went wrong is a fast case in tests/test_files.py. A child may take 1 GB more
than what its imports have mapped. An input is read, or refused by a ValueError or FileNotFoundError that names a file;
everything else went wrong: another exception, no name, no memory, more than 20 s, or the end of the process.
"""
import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from pixcon.data import ImageList, read_image, scan
from pixcon.detect import average_precision
from pixcon.export import read_weights
from pixcon.keypoints import open_pairs
from pixcon.labelled import LabelledImages, open_labelled
from pixcon.objects import Objects, encode_mask, open_objects
from pixcon.probe import read_results
from pixcon.run import cut_lines, read_log, trained_backbone
from pixcon.training import known_epochs

ROOM, PATIENCE = 2**30, 20
NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
PIL_NOISE = Image.fromarray(NOISE)

# ---- what is drawn: damaged bytes, JSON with a part replaced, arrays of all kinds

EDITS = st.lists(st.tuples(st.sampled_from('flip cut drop put fill double'.split()),
                           st.floats(0, 1, exclude_max=True), st.binary(max_size=12)), min_size=1, max_size=4)


def edited(whole, edits):
    "Bytes with some changes."
    found = bytearray(whole)
    for kind, where, new in edits:
        at = int(where*len(found))
        if kind == 'flip' and found: found[at] ^= 1 << len(new) % 8
        if kind == 'cut': del found[at:]
        if kind == 'drop': del found[at:at + len(new)]
        if kind == 'put': found[at:at] = new
        if kind == 'fill': found[at:at + 4] = (b'\xff\xff\xff\xff', b'\x00'*4, b'\x7f\xff\xff\xff')[len(new) % 3]
        if kind == 'double': found[at:at] = found[at:at + 64]
    return bytes(found)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 70), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, -10**18, 2**31, 2**63, 1e9, 1e308, '', '../../etc/passwd', '/etc/passwd', '\ud800',
                     '\x00', 'é', [], {}, [[]], [1e9]*6, [0, 0, 1, 1], 'p_a2', 'a'*300, dict(size=[4, 5], counts='9')]),
    st.recursive(st.integers(-3, 99) | st.floats(), lambda x: st.lists(x, max_size=8), max_leaves=12))


def places(content, path=()):
    "Paths of all parts of a tree of dicts and lists."
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, part in items: yield from places(part, (*path, key))


def replaced(content, changes):
    "A tree with some parts replaced by others, or taken out."
    content = json.loads(json.dumps(content))
    for where, new in changes:
        new = copy.deepcopy(new)
        every = list(places(content))
        path = every[int(where*len(every))]
        if not path:
            return new
        part = content
        for key in path[:-1]: part = part[key]
        if new == 'p_a2': part.pop(path[-1])
        else: part[path[-1]] = new
    return content


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), ODD), min_size=1, max_size=3)
NESTED = st.sampled_from([b'['*100_000, b'{"a":'*50_000, b'9'*5000, b'\xff\xfe', b'', b'null', b'"a"', b'NaN'])


def json_like(content):
    "Bytes of a JSON file: a part replaced, damaged, or nonsense."
    text = json.dumps(content).encode()
    return st.one_of(CHANGES.map(lambda c: json.dumps(replaced(content, c)).encode()),
                     CHANGES.map(lambda c: json.dumps(replaced(content, c)).encode()),
                     EDITS.map(lambda e: edited(text, e)), NESTED)


def saved(image, kind, **kwargs):
    "Bytes of an image file."
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def image_files():
    "Whole image files of many kinds, by ending."
    text = PngImagePlugin.PngInfo()
    text.add_itxt('XML:com.adobe.xmp', '<x tiff:Orientation="6"/>')
    found = []
    for kind, end in dict(PNG='png', JPEG='jpg', TIFF='tif', BMP='bmp', GIF='gif', WEBP='webp', PPM='ppm').items():
        for mode in ('RGB', 'L', 'P', '1', 'CMYK', 'I;16', 'F', 'RGBA'):
            image = Image.fromarray(NOISE[..., 0].astype(np.uint16)*257) if mode == 'I;16' else PIL_NOISE.convert(mode)
            with contextlib.suppress(Exception): found.append((end, saved(image, kind)))
    found += [('tif', saved(PIL_NOISE, 'TIFF', compression=c)) for c in ('tiff_lzw', 'tiff_deflate', 'jpeg', 'packbits')]
    return [*found, ('png', saved(PIL_NOISE, 'PNG', pnginfo=text))]


IMAGES = image_files()
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
ARRAYS = st.one_of(
    st.binary(min_size=4*81, max_size=4*81).flatmap(lambda b: st.sampled_from(['uint8', 'uint16', 'int32', 'float32']).map(
        lambda kind: np.frombuffer(b, kind)[:81].reshape(9, 9))),
    st.lists(st.integers(-5, 300) | st.floats(width=32), min_size=4, max_size=4).map(
        lambda v: np.array(v, np.float32).reshape(2, 2)))


# ---- the readers: each puts a case into a folder and reads it as a run would

def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def images_case(): return st.tuples(st.sampled_from(IMAGES), EDITS)


def images(folder, case):
    (end, whole), edits = case
    put(folder/f'p_a.{end}', edited(whole, edits))
    found = ImageList(folder)
    scan(found)
    assert found[0].dtype == torch.uint8 and found[0].ndim == 3


def labels_case():
    grey = [(end, w) for end, w in IMAGES if end in ('png', 'tif', 'bmp', 'gif', 'ppm')]
    return st.one_of(st.tuples(st.sampled_from(grey), EDITS).map(lambda c: (c[0][0], edited(c[0][1], c[1]))),
                     ARRAYS.map(lambda a: ('tif', saved(Image.fromarray(a), 'TIFF'))))


def labels(folder, case):
    end, content = case
    put(folder/'train'/'labels'/f'p_a.{end}', content)
    put(folder/'train'/'images'/'p_a.png', saved(PIL_NOISE, 'PNG'))
    data = open_labelled(f'pairs:{folder}', ignore=7)
    image, label = data[0]
    assert ((label >= 0) & (label < data.classes) | (label == 255)).all()


def voc_labels_case(): return EDITS.map(lambda e: edited(b'p_a\np_b\n/JPEGImages/p_a.jpg /SegmentationClass/p_a.png\n', e))


def voc_labels(folder, content):
    put(folder/'ImageSets'/'Segmentation'/'train.txt', content)
    for stem in ('p_a', 'p_b'):
        put(folder/'JPEGImages'/f'{stem}.jpg', saved(PIL_NOISE, 'JPEG'))
        put(folder/'SegmentationClass'/f'{stem}.png', saved(PIL_NOISE.convert('L').point(lambda v: v % 21), 'PNG'))
    data = open_labelled(f'voc:{folder}')
    for i in range(len(data)): data[i]


MASK = encode_mask(np.arange(192).reshape(12, 16) % 3 == 0)
COCO = dict(
    images=[dict(id=i, file_name=f'p_{n}.png', height=12, width=16) for i, n in enumerate('ab')],
    categories=[dict(id=3, name='cat'), dict(id=8, name='dog')],
    annotations=[
        dict(id=1, image_id=0, category_id=3, bbox=[1, 2, 5, 6], area=30, iscrowd=0, segmentation=[[1, 2, 6, 2, 6, 8]]),
        dict(id=2, image_id=0, category_id=8, bbox=[1, 2, 5, 6], segmentation=MASK),
        dict(id=3, image_id=1, category_id=8, bbox=[0., 0., 16., 12.], iscrowd=0,
             segmentation=dict(size=[12, 16], counts=[0, 100, 92]))])


def coco_case(): return json_like(COCO)


def coco(folder, content):
    put(folder/'annotations'/'instances_train.json', content)
    for n in 'ab': put(folder/'train'/f'p_{n}.png', saved(PIL_NOISE, 'PNG'))
    for masks in (False, True):
        data = Objects(folder/'train', folder/'annotations'/'instances_train.json', masks)
        items = [data[i] for i in range(len(data))]
        for _, t in items:
            assert t['boxes'].isfinite().all() and (t['labels'] > 0).all()
        found = [dict(image_id=i, category_id=c, score=.5, bbox=[0, 0, 4, 4]) for i in data.ids for c in data.coco.cats]
        if any(len(t['boxes']) for _, t in items): average_precision(data.coco, found, ids=data.ids)


VOC = b"""<annotation><filename>p_a.jpg</filename><size><width>16</width><height>12</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>10</ymax></bndbox>
</object></annotation>"""
LAUGHS = b'<!DOCTYPE a [<!ENTITY a0 "ha">' + b''.join(
    b'<!ENTITY a%d "%s">' % (k, b'&a%d;' % (k - 1)*10) for k in range(1, 12)) + b']><annotation>&a11;</annotation>'
ODD_WORDS = st.sampled_from([b'', b'nan', b'inf', b'-5', b'1e400', b'9'*5000, b'2.5', b'cat', 'é'.encode(), b'1_0', b'&x;'])


def voc_case():
    words = st.tuples(st.sampled_from([b'16', b'12', b'cat', b'>0<', b'>2<', b'>9<', b'<size>', b'bndbox', b'</object>']), ODD_WORDS)
    return st.one_of(EDITS.map(lambda e: edited(VOC, e)), st.just(LAUGHS), st.just(b'<a>'*100_000),
                     words.map(lambda w: VOC.replace(w[0], b'>' + w[1] + b'<' if w[0][:1] == b'>' else w[1])))


def voc(folder, content):
    for year in ('2007', '2012'):
        for part in ('trainval', 'test'): put(folder/f'VOC{year}'/'ImageSets'/'Main'/f'{part}.txt', b'p_a\n')
        put(folder/f'VOC{year}'/'Annotations'/'p_a.xml', VOC)
        put(folder/f'VOC{year}'/'JPEGImages'/'p_a.jpg', saved(PIL_NOISE, 'JPEG'))
    put(folder/'VOC2007'/'Annotations'/'p_a.xml', content)
    for data in open_objects(folder, masks=False):
        for i in range(len(data)): data[i]


CONFIG = dict(backbone='resnet18', stride=0, data='scenes', size=32, seed=0, epochs=2, dense_weight=.5, matching='sim',
              reweight=True, batch=4)
STATE = {'conv1.weight': torch.zeros(4, 3, 2, 2), 'bn1.bias': torch.zeros(4)}


def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


CHECKPOINT = dict(format=2, config=CONFIG, step=3, identity={}, seconds=1., skipped=0)


def evil():
    "A pickle that would run a command."
    class Evil:
        def __reduce__(self): return os.system, ('touch /tmp/pixcon-was-here',)
    return torch_bytes(dict(config=Evil(), step=1, model=Evil()))


def checkpoint_case():
    model = {f'online.backbone.{n}': t for n, t in STATE.items()}
    whole = torch_bytes(CHECKPOINT | dict(model=model))
    def changed(changes):
        content = replaced(CHECKPOINT, changes)
        if isinstance(content, dict): content.setdefault('model', model)
        return torch_bytes(content)
    return st.one_of(EDITS.map(lambda e: edited(whole, e)), CHANGES.map(changed), CHANGES.map(changed),
                     CHANGES.map(lambda c: torch_bytes(CHECKPOINT | dict(model=replaced(dict(a=1, b=dict(c=2)), c)))),
                     st.just(evil()))


def checkpoint(folder, content):
    put(folder/'p_run'/'checkpoint.pt', content)
    trained_backbone(folder/'p_run')


def safetensors_case():
    file = Path(tempfile.mkdtemp())/'a.safetensors'
    def made(about):
        save_file(STATE, file, about)
        return file.read_bytes()
    about = dict(config=json.dumps(CONFIG), step='3', encoder='online')
    whole = made(about)
    return st.one_of(EDITS.map(lambda e: edited(whole, e)),
                     json_like(CONFIG).map(lambda c: made(about | dict(config=c.decode(errors='replace')))),
                     st.text(max_size=5).map(lambda t: made(about | dict(step=t))))


def safetensors(folder, content):
    put(folder/'p_a.safetensors', content)
    trained_backbone(folder/'p_a.safetensors')


def weights_case():
    arrays = {n: t.numpy() for n, t in STATE.items()}
    files = [('pkl', pickle.dumps(dict(model=arrays), 4)), ('pth', torch_bytes(STATE)), ('pth', torch_bytes(dict(state_dict=STATE))),
             ('pkl', b'\x80\x04\x96\xff\xff\xff\xff\x00\x00\x00\x00.'), ('pkl', b'\x80\x04r\xff\xff\xff\x7f.'), ('pth', evil())]
    return st.one_of(st.sampled_from(files).flatmap(lambda f: EDITS.map(lambda e: (f[0], edited(f[1], e)))),
                     st.sampled_from(files),
                     CHANGES.map(lambda c: ('pth', torch_bytes(replaced(dict(state_dict=dict(a=1), meta=dict(pixcon={})), c)))),
                     CHANGES.map(lambda c: ('pkl', pickle.dumps(replaced(dict(model=dict(a=1), about={}), c)))))


def weights(folder, case):
    end, content = case
    put(folder/f'p_a.{end}', content)
    read_weights(folder/f'p_a.{end}')


def config_case(): return json_like(CONFIG)


def config(folder, content):
    put(folder/'config.json', content)
    epochs = known_epochs(folder)
    assert type(epochs) is int and epochs > 0, epochs


LOG = b''.join(json.dumps(dict(step=k, epoch=k/4, loss=1.5, seconds=.1)).encode() + b'\n' for k in range(4))


def log_case(): return st.one_of(EDITS.map(lambda e: edited(LOG, e)), json_like(dict(step=4, loss=.5)).map(lambda c: LOG + c + b'\n'))


def log(folder, content):
    put(folder/'log.jsonl', content)
    lines = read_log(folder)
    assert all(isinstance(line['step'], int) for line in lines)
    cut_lines(folder/'log.jsonl', 2)


RESULT = dict(task='segment', data='scenes', variant='sr', seed=0, miou=42., iou=dict(sky=1.), accuracy=50., epochs=3,
              settings=dict(size=3, backbone='resnet18'))


def result_case(): return json_like(RESULT)


def result(folder, content):
    put(folder/'a'/'result.json', json.dumps(RESULT).encode())
    put(folder/'p_b'/'result.json', content)
    read_results(folder)


SPAIR = dict(src_imname='p_a.jpg', trg_imname='p_b.jpg', category='cat', src_kps=[[1, 2], [3, 4]], trg_kps=[[2, 2], [3, 5]],
             src_bndbox=[0, 0, 16, 12], trg_bndbox=[0, 0, 16, 12])


def spair_case(): return json_like(SPAIR)


def spair(folder, content):
    put(folder/'PairAnnotation'/'test'/'p_a.json', content)
    for n in 'ab': put(folder/'JPEGImages'/'cat'/f'p_{n}.jpg', saved(PIL_NOISE, 'JPEG'))
    data = open_pairs(folder, 'test')
    for i in range(len(data)): data[i]


READERS = dict(images=images, labels=labels, voc_labels=voc_labels, coco=coco, voc=voc, checkpoint=checkpoint,
               safetensors=safetensors, weights=weights, config=config, log=log, result=result, spair=spair)


# ---- children, and what became of the cases

def names(folder): return {p.name for p in folder.rglob('*') if p.is_file()} | {p.name for p in folder.rglob('p_*')}


def outcome(read, folder, case):
    "What became of a case, in a few words: 'read' and 'refused' are right."
    try: read(folder, case)
    except MemoryError: return 'MemoryError'
    except TimeoutError: return 'took more than 20 s'
    except (ValueError, FileNotFoundError) as e:
        return 'refused' if str(folder) in str(e) or any(n in str(e) for n in names(folder)) else f'no name: {type(e).__name__}: {str(e)[:60]}'
    except BaseException as e: return f'{type(e).__name__}: {str(e)[:60]}'
    return 'read'


def limit():
    "The memory of this process."
    now = resource.getpagesize()*int(Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def too_long(*_): raise TimeoutError


def child(name, number, until, journal, present):
    "Tries cases until the time is over; a line of the journal before and behind each."
    limit()
    signal.signal(signal.SIGALRM, too_long)
    out = open(journal, 'a', buffering=1, errors='backslashreplace')
    quiet = os.open(f'{present}.said', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2): os.dup2(quiet, fd)
    def tried(case):
        if time.time() > until: os._exit(0)
        Path(present).write_bytes(pickle.dumps(case))
        out.write('begun\n')
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(PATIENCE)
            what = outcome(READERS[name], Path(folder), case)
            signal.alarm(0)
        out.write(' '.join(what.split()) + '\n')
        if what not in ('read', 'refused'): shutil.copy(present, f'{present}.{abs(hash(what)) % 10**8}')
    case = globals()[f'{name}_case']()
    how = settings(max_examples=10**6, database=None, deadline=None, phases=[Phase.generate],
                   suppress_health_check=list(HealthCheck))
    try:
        while True: seed(number)(how(given(case)(tried)))()
    except BaseException:                                              # of this program, not of a reader
        Path(f'{present}.said').write_text(traceback.format_exc())
        raise


def tried(name, seconds, keep):
    "Cases of one reader by what became of them."
    until, counts, number = time.time() + seconds, Counter(), 0
    journal, present = keep/f'{name}.journal', keep/f'{name}.case'
    while time.time() < until:
        number += 1
        journal.write_text('')
        process = multiprocessing.get_context('fork').Process(target=child, args=(name, number, until, journal, present))
        process.start()
        process.join(seconds + 3*PATIENCE)
        if process.is_alive(): process.kill()
        process.join()
        lines = journal.read_text().splitlines()
        counts.update(line for line in lines if line != 'begun')
        if process.exitcode and lines:
            counts[f'ended the process ({process.exitcode})'] += 1
            shutil.copy(present, f'{present}.ended{number}')
        if process.exitcode and not lines: raise SystemExit(f'{name}: the child dies before its first case')
    return counts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seconds', type=float, default=30)
    parser.add_argument('--only', nargs='*', choices=READERS, default=list(READERS))
    parser.add_argument('--keep', default=tempfile.mkdtemp())
    words = parser.parse_args()
    Path(words.keep).mkdir(exist_ok=True)
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    right = True
    print(f"{'reader':12} {'inputs':>7} {'read':>7} {'refused':>8} {'died':>6} {'unfriendly':>11}")
    for name in words.only:
        found = tried(name, words.seconds, Path(words.keep))
        wrong = {w: n for w, n in found.items() if w not in ('read', 'refused')}
        died = sum(n for w, n in wrong.items() if w.startswith(('ended', 'MemoryError', 'took')))
        print(f"{name:12} {found.total():7} {found['read']:7} {found['refused']:8} {died:6} {sum(wrong.values()) - died:11}")
        for w, n in Counter(wrong).most_common(12): print(f'    {n:6}  {w}')
        sys.stdout.flush()
        right = right and not wrong
    print(f'cases that went wrong: {words.keep}')
    return not right


if __name__ == '__main__': raise SystemExit(main())
