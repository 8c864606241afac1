"""Files that nobody checked: each reader gives what it should or a sentence that names the file. What fuzz_readers.py found."""
import io
import json
import os
import pickle
import struct
import warnings
import zlib
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from pixcon.data import ImageList, Unreadable, decoders, read_image, read_quietly, scan, told
from pixcon.detect import Draws, learn_and_score, configure_detect, load_detector
from pixcon.export import read_weights
from pixcon.keypoints import open_pairs
from pixcon.labelled import LabelledImages, open_labelled
from pixcon.objects import Objects, coco_index, read_voc
from pixcon.probe import read_results
from pixcon.run import read_log, read_run, trained_backbone
from pixcon.segment import Augmented, configure_segment, segment_config
from pixcon.study import remember
from pixcon.training import configure, known_epochs, pretrain, refuse_too_large

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PIL_NOISE = Image.fromarray(NOISE)


# ---- records, logs, lists

NESTED = b'['*100_000


@pytest.mark.parametrize('text', [b'', NESTED, b'null', b'[1]', b'"a"', b'\xff', b'9'*5000, b'{"epochs": "2"}', b'{}', b'{"epochs": 0}'])
def test_parameters_of_a_run(tmp_path, text):
    (tmp_path/'config.json').write_bytes(text)
    with pytest.raises(ValueError, match='config.json'): known_epochs(tmp_path)
    if b'epochs' not in text and text != b'{}':
        (tmp_path/'detector.safetensors').write_bytes(b'')
        with pytest.raises(ValueError, match='config.json'): load_detector(tmp_path)
        (tmp_path/'study.json').write_bytes(text)
        with pytest.raises(ValueError, match='study.json'): remember(tmp_path, {})


@pytest.mark.parametrize('line', [b'', NESTED, b'3', b'[1]', b'null', b'\xff', b'{"loss": 1}', b'{"step": "3"}'])
def test_log(tmp_path, line):
    "The number of the line is said, too; a line that was cut off is passed over."
    (tmp_path/'log.jsonl').write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"st')
    with pytest.raises(ValueError, match='line 2 of .*log.jsonl'): read_log(tmp_path)
    (tmp_path/'log.jsonl').write_bytes(b'{"step": 1}\n{"st')
    assert read_log(tmp_path) == [dict(step=1)]


GOOD = dict(format=2, config=dict(backbone='resnet18', stride=0), step=1, model={}, identity={})


@pytest.mark.parametrize('wrong', [
    dict(config=[1]), dict(config={}), dict(config=dict(backbone=3, stride=0)), dict(config=dict(backbone='resnet18', stride=[2])),
    dict(config=dict(backbone='resnet18', stride=77)), dict(step='one'), dict(model=3), dict(model={'online.backbone.conv1.weight': 3}),
    dict(identity=None), dict(config=dict(backbone='no such net', stride=0))])
def test_checkpoint(tmp_path, wrong):
    torch.save(GOOD | wrong, tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match=tmp_path.name): trained_backbone(tmp_path)


@pytest.mark.parametrize('wrong', [dict(config='{'), dict(config='[]'), dict(config='{}'), dict(step='two'), dict(config='['*100_000)])
def test_safetensors(tmp_path, wrong):
    about = dict(config=json.dumps(GOOD['config']), step='1', encoder='online') | wrong
    save_file(dict(a=torch.zeros(1)), tmp_path/'a.safetensors', about)
    with pytest.raises(ValueError, match='a.safetensors'): trained_backbone(tmp_path/'a.safetensors')


class Evil:
    "A pickle that would run a command."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


def test_no_file_runs_code(tmp_path):
    "Neither a checkpoint nor weights."
    mark = tmp_path/'was-here'
    torch.save(GOOD | dict(model=Evil(mark)), tmp_path/'checkpoint.pt')
    torch.save(dict(state_dict=Evil(mark)), tmp_path/'a.pth')
    (tmp_path/'a.pkl').write_bytes(pickle.dumps(dict(model=Evil(mark))))
    for read, path in ((read_run, tmp_path), (read_weights, tmp_path/'a.pth'), (read_weights, tmp_path/'a.pkl')):
        with pytest.raises(ValueError, match='asks for .*system'): read(path)
    assert not mark.exists()


@pytest.mark.parametrize('wrong', [dict(data=3), dict(task=None), dict(variant=['sr']), dict(miou='much'), dict(settings=4), dict(epochs=[1])])
def test_results_that_are_none(tmp_path, wrong):
    "Named and passed over; the others make the table."
    good = dict(task='segment', data='scenes', variant='sr', seed=0, miou=42.)
    (tmp_path/'result.json').write_text(json.dumps(good))
    (tmp_path/'result-b.json').write_text(json.dumps(good | wrong))
    with pytest.warns(UserWarning, match='passed over: .*result-b.json'):
        assert read_results(tmp_path)['value'].tolist() == [42.]


@pytest.mark.parametrize('wrong', [dict(src_imname=3), dict(src_kps=3), dict(src_kps=[[1e999, 2]]), dict(trg_bndbox=3), dict(trg_bndbox=[0, 0, 'a', 1]),
                                   dict(src_kps=[[10**400, 1]]), dict(category=None)])
def test_keypoints(tmp_path, wrong):
    pair = dict(src_imname='a.jpg', trg_imname='b.jpg', category='cat', src_kps=[[1, 2]], trg_kps=[[2, 2]], trg_bndbox=[0, 0, 9, 9])
    (tmp_path/'PairAnnotation'/'test').mkdir(parents=True)
    (tmp_path/'PairAnnotation'/'test'/'p.json').write_text(json.dumps(pair | wrong))
    with pytest.raises(ValueError, match='p.json'): open_pairs(str(tmp_path))


# ---- annotations

XML = '<annotation><size><width>30</width><height>20</height></size><object><name>cat</name><bndbox>' \
      '<xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>10</ymax></bndbox></object></annotation>'
LAUGHS = '<!DOCTYPE a [<!ENTITY a0 "ha">' + ''.join(f'<!ENTITY a{k} "{f"&a{k-1};"*10}">' for k in range(1, 12)) + ']><annotation>&a11;</annotation>'
SECRET = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>' + XML.replace('>cat<', '>&x;<')


@pytest.mark.parametrize('text', ['', '<a', '<a>'*10_000, LAUGHS, SECRET, XML.replace('>30<', '><'), XML.replace('>30<', '>-3<'),
                                  XML.replace('>2<', '>nan<'), XML.replace('>2<', '>1e400<'), XML.replace('>cat<', '>unicorn<'), '<annotation/>'])
def test_voc(tmp_path, text):
    "Entities neither grow nor read other files."
    for folder in ('Annotations', 'ImageSets/Main'): (tmp_path/'VOC2007'/folder).mkdir(parents=True)
    (tmp_path/'VOC2007'/'ImageSets'/'Main'/'test.txt').write_bytes('ä'.encode('latin-1'))
    path = tmp_path/'VOC2007'/'Annotations'/os.fsdecode('ä.xml'.encode('latin-1'))
    path.write_text(XML)
    assert read_voc(tmp_path, [('2007', 'test')])['annotations'][0]['bbox'] == [1, 2, 8, 8]
    path.write_text(text)
    with pytest.raises(ValueError, match='xml. is no annotation of VOC') as caught: read_voc(tmp_path, [('2007', 'test')])
    assert len(str(caught.value)) < 1000


def coco(**changes):
    "A small COCO content with a part of its image, category or annotation replaced."
    image = dict(id=0, file_name='a.png', height=20, width=30)
    thing = dict(image_id=0, category_id=1, bbox=[1, 2, 5, 6])
    category = dict(id=1, name='cat')
    for name, value in changes.items():
        for part in (image, category, thing):
            if name in part or part is thing: part[name] = value
    return dict(images=[image], categories=[category], annotations=[thing])


@pytest.mark.parametrize('wrong', [dict(iscrowd=-7), dict(iscrowd=2**31), dict(iscrowd=[1]), dict(bbox=[10**400, 1.5, 2, 2]), dict(name=3),
                                   dict(file_name=3), dict(bbox=[[1], 2, 3, 4]), dict(file_name='../a.png')])
def test_coco(tmp_path, wrong):
    "The file is named, and the annotation where it is one; a file outside is read only if asked for."
    path = tmp_path/'instances.json'
    path.write_text(json.dumps(coco(**wrong)))
    with pytest.raises(ValueError, match='instances.json'): coco_index(path)
    if 'file_name' in wrong and wrong['file_name'] != 3:
        (tmp_path/'train').mkdir()
        PIL_NOISE.save(tmp_path/'a.png')
        assert Objects(tmp_path/'train', path, masks=False, outside=True)[0][0].shape == (3, 20, 30)


def test_coco_ids_of_two_kinds():
    content = coco()
    content['categories'].append(dict(id='dog', name='dog'))
    with pytest.raises(ValueError, match='ids of the categories must be all numbers or all texts'): coco_index(content)


# ---- images

def png_with(*chunks, behind=False):
    "A PNG with more chunks, before or behind its pixels."
    file = io.BytesIO()
    PIL_NOISE.save(file, 'PNG')
    whole = file.getvalue()
    at = whole.rindex(b'IEND') - 4 if behind else whole.index(b'IDAT') - 4
    packed = [struct.pack('>I', len(x)) + kind + x + struct.pack('>I', zlib.crc32(kind + x)) for kind, x in chunks]
    return whole[:at] + b''.join(packed) + whole[at:]


def turned_files():
    "Files that say in odd places that they are to be turned by a quarter."
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    profile = b'\nexif\n%8d\n%s\n' % (len(raw), raw.hex().encode())
    text = b'Raw profile type exif\0\0' + zlib.compress(profile)
    jpeg = io.BytesIO()
    PIL_NOISE.save(jpeg, 'JPEG', xmp=xmp)
    own = b'XML:com.adobe.xmp\0\0\0\0\0' + xmp
    return {'late.png': png_with((b'eXIf', raw.removeprefix(b'Exif\0\0')), behind=True), 'text.png': png_with((b'zTXt', text)),
            'xmp.png': png_with((b'iTXt', own)), 'late xmp.png': png_with((b'iTXt', own), behind=True), 'xmp.jpg': jpeg.getvalue()}


@pytest.mark.parametrize('name', turned_files())
def test_orientation_outside_of_exif(tmp_path, name):
    "Every decoder that reads the file, and the scan, turn it as Pillow does."
    path = tmp_path/name
    path.write_bytes(turned_files()[name])
    for decode in decoders().values():
        with open(path, 'rb') as file:
            try: assert decode(file).shape == (3, 30, 20)
            except ValueError: pass                                    # left to Pillow
    assert read_image(path).shape == (3, 30, 20)
    assert scan(ImageList(tmp_path))[0].tolist() == [[30, 20]]


def test_scan_of_a_png_does_not_decode_it(tmp_path, monkeypatch):
    (tmp_path/'a.png').write_bytes(png_with((b'tEXt', b'Title\0no EXIF here')))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', lambda *_: pytest.fail('decoded'))
    assert scan(ImageList(tmp_path))[0].tolist() == [[20, 30]]


def test_what_libraries_say_is_listed(tmp_path, capfd):
    "Not on the screen, once for a file, under its name; also where the file can't be read, and by Python."
    PIL_NOISE.save(tmp_path/'lzw.tif', compression='tiff_lzw')
    spoilt = bytearray((tmp_path/'lzw.tif').read_bytes())
    spoilt[20] ^= 255
    (tmp_path/'lzw.tif').write_bytes(spoilt)
    for _ in range(2):
        with pytest.raises(Unreadable): read_quietly(tmp_path/'lzw.tif', tmp_path/'remarks.txt')
    def speaks(path):
        warnings.warn('something is odd')                              # on stderr, outside of pytest
        os.write(2, b'and more\n')
        return 7
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        assert read_quietly(tmp_path/'other.png', tmp_path/'remarks.txt', speaks) == 7
    first, second = (tmp_path/'remarks.txt').read_text().splitlines()
    assert 'lzw.tif: ' in first and 'other.png: ' in second and 'and more' in second
    assert not capfd.readouterr().err


ODD = os.fsdecode(b'B\xfccher')                                        # not UTF-8


def can_hold(folder, name):
    try: (folder/name).mkdir()
    except (OSError, UnicodeError): return False
    return True


def test_names_that_are_not_utf8(tmp_path, monkeypatch, capsys):
    "A whole run on such a folder, with a damaged file: printed, listed, saved, resumed, exported."
    if not can_hold(tmp_path, ODD): pytest.skip('this file system takes UTF-8 names only')
    monkeypatch.chdir(tmp_path)
    for i in range(104): PIL_NOISE.rotate(i).save(tmp_path/ODD/f'{ODD}{i:03d}.png')
    damaged = tmp_path/ODD/f'{ODD}000.png'
    damaged.write_bytes(damaged.read_bytes()[:500])
    given = dict(data=str(tmp_path/ODD), batch=52, size=32, hidden=16, dim=8, queue=20, recipe='small', log_steps=1, workers=0, warmup_epochs=0.)
    pretrain(**given, epochs=1)
    capsys.readouterr().out.encode()                                   # could be printed
    run, = (tmp_path/'runs').iterdir()
    line, = (json.loads(text) for text in (run/'unread.jsonl').read_text().splitlines())
    assert line['image'] == str(damaged)                               # the file can be found by it
    assert read_run(run)[2] == read_run(run/'backbone.safetensors')[2] == 2
    pretrain(**given, epochs=1)
    assert told(damaged).endswith(r'B\xfccher000.png')


# ---- fine-tuning

def pairs(folder, n, split='train'):
    "Labelled images of 8 x 8 pixels."
    for kind in ('images', 'labels'): (folder/split/kind).mkdir(parents=True)
    for i in range(n):
        PIL_NOISE.resize((8, 8)).save(folder/split/'images'/f'{i:03d}.png')
        Image.fromarray(np.full((8, 8), i % 2, np.uint8)).save(folder/split/'labels'/f'{i:03d}.png')


def bomb(path):
    "A small PNG that says it has 20,000 x 20,000 pixels."
    head = b'IHDR' + struct.pack('>II', 20_000, 20_000) + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + head + struct.pack('>I', zlib.crc32(head)) + png_with()[33:])


def test_damaged_files_of_labelled_images(tmp_path):
    """One in a hundred is replaced and listed, by the scan or when it is read; more are refused before the training,
    and so is any that is to be scored."""
    pairs(tmp_path, 200)
    pairs(tmp_path, 3, 'val')
    given = dict(data=f'pairs:{tmp_path}', out=tmp_path/'run', backbone='resnet18', workers=0, batch=2,
                 short=8, crop_height=8, crop_width=8)
    bomb(tmp_path/'train'/'images'/'000.png')
    label = tmp_path/'train'/'labels'/'001.png'
    label.write_bytes(label.read_bytes()[:44])
    config, train, val = configure_segment(**given)
    assert list(train.bad) == [0] and 'DecompressionBomb' in train.bad[0] and config.classes == 2
    (tmp_path/'run').mkdir()
    items = Augmented(train, config)
    for p in range(200): items[p]
    lines = [json.loads(text) for text in (tmp_path/'run'/'unread.jsonl').read_text().splitlines()]
    assert {line['number'] for line in lines} == {0, 1} and 'cannot read label' in str(lines)
    assert torch.equal(items[0][0], Augmented(train, config)[0][0])    # the same in its place again
    (tmp_path/'train'/'images'/'002.png').write_bytes(b'')
    (tmp_path/'train'/'images'/'003.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r"3 of 200 images can't be read, more than 1%:\n(.*\n)*.*002.png: image: empty file"):
        configure_segment(**given)
    third = tmp_path/'train'/'labels'/'004.png'                        # found only when it is read
    third.write_bytes(third.read_bytes()[:44])
    with pytest.raises(ValueError, match="3 of 200 items can't be read, more than 1%"):
        for p in range(200): items[p]
    for i in (2, 3): PIL_NOISE.resize((8, 8)).save(tmp_path/'train'/'images'/f'{i:03d}.png')
    (tmp_path/'val'/'labels'/'001.png').write_bytes(b'')
    with pytest.raises(ValueError, match="1 of 3 images can't be read, more than 0%:\n.*001.png: label: empty file"):
        configure_segment(**given)


def test_damaged_files_of_objects(tmp_path):
    "The same rule."
    for part, n in (('train', 150), ('val', 2)):
        (tmp_path/part).mkdir()
        (tmp_path/'annotations').mkdir(exist_ok=True)
        for i in range(n): PIL_NOISE.save(tmp_path/part/f'{i:03d}.png')
        content = dict(images=[dict(id=i, file_name=f'{i:03d}.png', height=20, width=30) for i in range(n)],
                       categories=[dict(id=1, name='cat')],
                       annotations=[dict(image_id=i, category_id=1, bbox=[1, 2, 5, 6]) for i in range(n)])
        (tmp_path/'annotations'/f'instances_{part}.json').write_text(json.dumps(content))
    config = configure_detect(data=tmp_path, out=tmp_path/'run', masks=False)
    (tmp_path/'train'/'007.png').write_bytes(b'no image')
    train, _ = learn_and_score(config)
    assert train.bad == {7: 'no image'}
    (tmp_path/'run').mkdir()
    draws = Draws(train, 0, tmp_path/'run')
    for p in range(150): draws[p]
    assert [json.loads(text)['image'] for text in (tmp_path/'run'/'unread.jsonl').read_text().splitlines()] == ['007.png']
    (tmp_path/'train'/'008.png').write_bytes(b'')
    with pytest.raises(ValueError, match="2 of 150 images can't be read"): learn_and_score(config)
    PIL_NOISE.save(tmp_path/'train'/'008.png')
    (tmp_path/'val'/'000.png').write_bytes(b'')
    with pytest.raises(ValueError, match="1 of 2 images can't be read, more than 0%"): learn_and_score(config)


def test_lists_of_voc(tmp_path):
    "Names in any encoding; no list of names is named."
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'): (tmp_path/folder).mkdir(parents=True)
    split = tmp_path/'ImageSets'/'Segmentation'/'train.txt'
    name = os.fsdecode('ä'.encode('latin-1'))
    PIL_NOISE.save(tmp_path/'JPEGImages'/f'{name}.jpg')
    PIL_NOISE.convert('L').point(lambda v: v % 21).save(tmp_path/'SegmentationClass'/f'{name}.png')
    split.write_bytes(os.fsencode(name) + b'\n')
    assert open_labelled(f'voc:{tmp_path}')[0][0].shape == (3, 20, 30)
    for text in (b'a\0b', b'a'*5000):
        split.write_bytes(text)
        with pytest.raises(ValueError, match='train.txt. is no list of names'): open_labelled(f'voc:{tmp_path}')
    split.write_bytes(b'\n')
    with pytest.raises(FileNotFoundError, match='no image is named in .*train.txt'): open_labelled(f'voc:{tmp_path}')


def test_labels_with_too_many_numbers(tmp_path):
    "The file with the largest is named; numbers to ignore have a limit, as they are looked up in a table."
    pairs(tmp_path, 2)
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path/'train'/'labels'/'001.tif')
    (tmp_path/'train'/'labels'/'001.png').unlink()
    with pytest.raises(ValueError, match='got 70001: label .*001.tif. holds 70000'): open_labelled(f'pairs:{tmp_path}')
    with pytest.raises(ValueError, match='ignore must be numbers up to 16777216, got 2147483647'):
        LabelledImages(tmp_path/'train'/'images', tmp_path/'train'/'labels', 2, ignore=2**31 - 1)


def test_nothing_is_ignored():
    "What a data set has no use for is refused."
    with pytest.raises(ValueError, match='scenes has 12, got 999'): open_labelled('scenes', classes=999)
    with pytest.raises(ValueError, match='got 7'): open_labelled('scenes', ignore=7)
    assert open_labelled('scenes', classes=12, ignore=255).classes == segment_config().classes or 12


# ---- sizes

@pytest.mark.parametrize('name,value', dict(queue=10**12, hidden=10**9, dim=10**9, size=10**6, scene_size=10**7, scenes=10**15).items())
def test_sizes_that_can_not_fit(tmp_path, name, value):
    "Before any memory is asked for, with the number of bytes."
    with pytest.raises(ValueError, match=rf'[\d,.]+ GB would be needed and [\d,.]+ GB .* free: lower {name}, got {value}'):
        configure(out=tmp_path/'run', **{name: value})


def test_sizes_that_fit(tmp_path):
    "The paper's own run is left to the plan, whose advice is a larger `accumulate`; a small one asks for nothing."
    paper, images = configure(out=tmp_path/'run', recipe='paper', data='scenes', scenes=2048)
    refuse_too_large(paper, images, 8e9)
    with pytest.raises(ValueError, match='lower size, got 2000'): refuse_too_large(replace(paper, size=2000), images, 1e9)
    refuse_too_large(configure(out=tmp_path/'run')[0], images, 1e9)


@pytest.mark.parametrize('wrong,named', [(dict(miou=10**400), 'miou'), (dict(data='\ud800'), 'data'), (dict(epochs=2**60), 'epochs')])
def test_results_that_no_table_can_hold(tmp_path, wrong, named):
    "An integer that is no float, half a character: named and passed over, the others are shown; an odd name is not."
    good = dict(task='segment', data=ODD, variant='sr', seed=0, miou=42.)
    for k, content in enumerate((good, good | wrong)): (tmp_path/f'result{k}.json').write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f'passed over: .*result1.json.* its {named} is'):
        assert read_results(tmp_path)['value'].tolist() == [42.]


def test_a_name_too_long_for_the_system(tmp_path):
    "Of SPair's photos: a sentence that names the list, not the system's error."
    for name in ('JPEGImages', 'PairAnnotation/trn'): (tmp_path/name).mkdir(parents=True)
    pair = dict(src_imname='a'*300, trg_imname='b.jpg', category='cat', src_kps=[[1, 2]], trg_kps=[[2, 2]], trg_bndbox=[0, 0, 9, 9])
    (tmp_path/'PairAnnotation'/'trn'/'1.json').write_text(json.dumps(pair))
    with pytest.raises(ValueError, match="src_imname in .*1.json.* is longer than a file's name may be"):
        open_pairs(str(tmp_path), split='trn')
