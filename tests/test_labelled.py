"""Readers of labelled data against files written here, whole, odd and damaged."""
import random
import numpy as np
import pytest
import torch
from PIL import Image
from pixcon.labelled import LabelledImages, LabelledScenes, open_labelled, show_labels

CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
COCO_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def save(path, array, mode=None):
    "Writes an array as an image file, with a palette if mode is P."
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array, dtype=np.uint16 if mode == 'I;16' else np.uint8)
    picture = Image.fromarray(array)
    if mode == 'P':
        picture = picture.convert('P')
        picture.putpalette([(i*37 + c*91) % 256 for i in range(256) for c in range(3)])
    picture.save(path)


def noise(height, width, seed=0):
    "A random image (H,W,3)."
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pairs_of_odd_sizes_and_grey_images(tmp_path):
    "Matched by name in subfolders; grey images become RGB; labels of any depth are numbers."
    for name, mode, shape in (('a', 'P', (5, 9)), ('sub/b', None, (7, 3)), ('c', 'I;16', (1, 11))):
        image = noise(*shape)[..., 0] if name == 'c' else noise(*shape)
        label = np.arange(shape[0]*shape[1]).reshape(shape) % 4
        save(tmp_path/'images'/'train'/f'{name}.png', image)
        save(tmp_path/'labels'/'train'/f'{name}.png', label, mode)
    save(tmp_path/'images'/'train'/'unlabelled.png', noise(4, 4))
    data = open_labelled(str(tmp_path))
    assert (len(data), data.classes, data.unlabelled, data.kind) == (3, 4, 1, 'pairs')
    assert '1 images without a label' in repr(data)
    assert [tuple(x.shape) for x, _ in data] == [(3, 5, 9), (3, 1, 11), (3, 7, 3)]
    for image, label in data:
        assert image.dtype == torch.uint8 and label.dtype == torch.int64
        assert torch.equal(label.flatten(), torch.arange(label.numel()) % 4)


def test_lists_of_files(tmp_path):
    "In the order given; lists of different lengths are refused."
    for name, code in (('a', 2), ('b', 1)):
        save(tmp_path/f'{name}.jpg', noise(3, 4))
        save(tmp_path/f'{name}.png', np.full((3, 4), code))
    images, labels = ([tmp_path/f'{name}.{end}' for name in 'ba'] for end in ('jpg', 'png'))
    assert [label.unique().tolist() for _, label in LabelledImages(images, labels)] == [[1], [2]]
    with pytest.raises(ValueError):
        LabelledImages(images, labels[:1])


def test_ignored_numbers_of_16_bits(tmp_path):
    "A number beyond 255 may mean no class; others beyond are refused."
    save(tmp_path/'train'/'images'/'a.png', noise(1, 3))
    save(tmp_path/'train'/'labels'/'a.png', [[0, 1, 65535]], 'I;16')
    data = open_labelled(str(tmp_path), classes=2, ignore=65535)
    assert data[0][1].tolist() == [[0, 1, 255]]
    assert open_labelled(str(tmp_path), ignore=[65535, 7]).classes == 2
    with pytest.raises(ValueError, match='holds 65535'):
        open_labelled(str(tmp_path), classes=2, ignore=7)[0]
    with pytest.raises(ValueError, match='at most 255 classes'):
        open_labelled(str(tmp_path))


def test_camvid_codes(tmp_path):
    "The SegNet layout; 11 is no class, by prefix or by `ignore`, and otherwise one of its own."
    save(tmp_path/'val'/'x.png', noise(4, 3))
    save(tmp_path/'valannot'/'x.png', np.arange(12).reshape(4, 3))
    expected = torch.tensor([*range(11), 255]).view(4, 3)
    named = open_labelled(f'camvid:{tmp_path}', 'val')
    assert torch.equal(named[0][1], expected)
    assert named.names[8] == 'car' and named.classes == 11
    assert torch.equal(open_labelled(str(tmp_path), 'val', ignore=11)[0][1], expected)
    assert open_labelled(str(tmp_path), 'val').classes == 12


@pytest.mark.parametrize('lists', [
    dict(train='p', train_aug='p q'),
    dict(train='p', trainaug='/JPEGImages/p.jpg@/SegmentationClassAug/p.png q'),
    dict(train='p', aug='q'),
])
@pytest.mark.parametrize('below', ['', 'VOC2012', 'VOCdevkit/VOC2012'])
def test_voc(tmp_path, lists, below):
    "Palettes, 255 as border, lists in three spellings, labels of SBD beside VOC's own."
    root = tmp_path/below
    for stem, folder, code in (('p', 'SegmentationClass', 20), ('q', 'SegmentationClassAug', 15)):
        save(root/'JPEGImages'/f'{stem}.jpg', noise(6, 8))
        save(root/folder/f'{stem}.png', [[0]*4 + [code]*3 + [255]]*6, 'P')
    splits = root/'ImageSets'/'Segmentation'
    splits.mkdir(parents=True)
    for name, stems in lists.items():
        lines = [s.replace('@', ' ') for s in stems.split()]
        (splits/f'{name}.txt').write_text('\n'.join(lines) + '\n')
    aug = open_labelled(str(tmp_path), 'train_aug')
    assert len(open_labelled(str(tmp_path))) == 1 and len(aug) == 2
    assert aug.kind == 'voc' and aug.names[15] == 'person'
    assert [sorted(label.unique().tolist()) for _, label in aug] == [[0, 20, 255], [0, 15, 255]]
    with pytest.raises(ValueError, match="no split 'test'"):
        open_labelled(str(tmp_path), 'test')


def test_ade20k_numbers(tmp_path):
    "Shifted by one, 0 is ignored."
    for part in ('training', 'validation'):
        save(tmp_path/'images'/part/'a.jpg', noise(3, 51))
        save(tmp_path/'annotations'/part/'a.png', np.r_[np.arange(151), 0, 0].reshape(3, 51))
    data = open_labelled(str(tmp_path), 'val')
    assert data.kind == 'ade20k'
    assert data[0][1].flatten().tolist() == [255, *range(150), 255, 255]


def test_cocostuff_numbers(tmp_path):
    "The gaps are closed, and the unused numbers are refused."
    used = [k for k in range(182) if k not in COCO_UNUSED]
    label = tmp_path/'stuffthingmaps'/'train2017'/'a.png'
    save(tmp_path/'images'/'train2017'/'a.jpg', noise(2, 86))
    save(label, np.array([*used, 255]).reshape(2, 86))
    (tmp_path/'annotations').mkdir()
    coco = open_labelled(str(tmp_path))
    assert coco.kind == 'cocostuff' and coco[0][1].flatten().tolist() == [*range(171), 255]
    save(label, np.full((2, 86), 11))
    with pytest.raises(ValueError, match='holds 11, which is none'):
        coco[0]


def test_cityscapes_ids(tmp_path):
    "The 34 ids give exactly the 19 classes in order, all else is ignored; files are sorted."
    for city in ('zurich', 'aachen'):
        images, labels = (tmp_path/part/'train'/city for part in ('leftImg8bit', 'gtFine'))
        save(images/f'{city}_0_0_leftImg8bit.png', noise(2, 17))
        save(labels/f'{city}_0_0_gtFine_labelIds.png', np.arange(34).reshape(2, 17))
    data = open_labelled(str(tmp_path))
    label = data[0][1].flatten()
    assert 'aachen' in str(data.pairs[0][0]) and len(data) == 2 and data.kind == 'cityscapes'
    assert label[label != 255].tolist() == list(range(19))
    assert (data.names[0], data.names[13], data.names[18]) == ('road', 'car', 'bicycle')
    assert [i for i, c in enumerate(label.tolist()) if c != 255] == CITYSCAPES


@pytest.mark.parametrize('wrong,message', [
    (lambda d: save(d/'labels'/'a.png', noise(4, 5)), 'colour picture'),
    (lambda d: save(d/'labels'/'a.png', np.zeros((4, 6))),
     r'different sizes .height, width.: \(4, 5\) in .*\(4, 6\) in'),
    (lambda d: save(d/'labels'/'a.png', np.full((4, 5), 3)),
     'holds 3, which is none of the 3 classes'),
    (lambda d: save(d/'labels'/'a.png', np.full((4, 5), 300), 'I;16'), 'holds 300'),
    (lambda d: Image.new('I', (5, 4), -1).save(d/'labels'/'a.tif') or (d/'labels'/'a.png').unlink(),
     'holds -1'),
    (lambda d: (d/'labels'/'a.png').write_bytes(b'nothing'), 'cannot read label'),
    (lambda d: save(d/'labels'/'z.png', np.zeros((4, 5))), 'labels have no image'),
    (lambda d: save(d/'labels'/'a.bmp', np.zeros((4, 5))), 'two files of one name'),
])
def test_unfit_labels_are_refused(tmp_path, wrong, message):
    "With the file's name and what is the matter."
    save(tmp_path/'train'/'images'/'a.png', noise(4, 5))
    save(tmp_path/'train'/'labels'/'a.png', np.zeros((4, 5)))
    open_labelled(str(tmp_path), classes=3)[0]
    wrong(tmp_path/'train')
    with pytest.raises(ValueError, match=message):
        open_labelled(str(tmp_path), classes=3)[0]


@pytest.mark.parametrize('mode', ['P', None, 'I;16'])
def test_flipped_bits_never_end_the_process(tmp_path, mode):
    "A label with one bit flipped is read, or refused by name."
    draws = random.Random(0)
    file, image = tmp_path/'train'/'labels'/'a.png', tmp_path/'train'/'images'/'a.png'
    save(image, noise(24, 32))
    save(file, np.arange(24*32).reshape(24, 32) % 5, mode)
    whole = file.read_bytes()
    data = LabelledImages([image], [file], classes=5)
    for _ in range(200):
        damaged, bit = bytearray(whole), draws.randrange(8*len(whole))
        damaged[bit//8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            assert data[0][1].shape == (24, 32)
        except ValueError as e:
            assert 'a.png' in str(e)


def test_unknown_folders_are_refused(tmp_path):
    "A folder that is not there, one without a data set, one that is not what the prefix says."
    with pytest.raises(FileNotFoundError, match='is no folder'):
        open_labelled('/no/such/folder')
    with pytest.raises(FileNotFoundError, match='has no split'):
        open_labelled(str(tmp_path))
    for kind in ('voc', 'cityscapes', 'ade20k'):
        with pytest.raises(FileNotFoundError, match='has no'):
            open_labelled(f'{kind}:{tmp_path}')


def test_scenes_of_two_splits():
    "The same each time, different between the splits, other splits are refused."
    train, again, val = (LabelledScenes(split, 3, 32) for split in ('train', 'train', 'val'))
    for a, b, c in zip(train, again, val):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    with pytest.raises(ValueError, match="there is no split 'test', there are: train, val"):
        open_labelled('scenes', 'test')


def test_one_colour_for_each_class():
    "Drawn from labels of any integer type; the legend names what occurs."
    label = torch.tensor([[0, 1], [2, 255]])
    axes = show_labels(dict(a=[label, label.to(torch.uint8)], b=[label, label]), ['x', 'y', 'z'])
    first, *others = (ax.images[0].get_array() for ax in axes)
    assert all(np.array_equal(first, other) for other in others) and (first[1, 1] == 1).all()
    assert len(np.unique(first.reshape(4, 3), axis=0)) == 4
    texts = [t.get_text() for t in axes[0].figure.legends[0].get_texts()]
    assert texts == ['x', 'y', 'z', 'no class']


def test_negative_numbers_and_numbers_that_are_none(tmp_path):
    "Ignored where that is said, else refused; as NaN and fractions are."
    for sub in ('images', 'labels'): (tmp_path/sub).mkdir()
    Image.new('RGB', (3, 1)).save(tmp_path/'images'/'a.png')
    def labelled(numbers, dtype, **given):
        Image.fromarray(np.array([numbers], dtype)).save(tmp_path/'labels'/'a.tif')
        return LabelledImages(tmp_path/'images', tmp_path/'labels', classes=2, **given)[0][1].tolist()
    assert labelled([0, -1, 1], np.int32, ignore=-1) == [[0, 255, 1]]
    assert labelled([0, -1, 255], np.int32, ignore=(-1, -7)) == [[0, 255, 255]]
    assert labelled([0, 1, 1], np.float32) == [[0, 1, 1]]
    with pytest.raises(ValueError, match='holds -1, which is none of the 2 classes'): labelled([0, -1, 1], np.int32)
    with pytest.raises(ValueError, match='holds 2, which is none'): labelled([0, 2, 1], np.int32, ignore=-1)
    for odd in (np.nan, .5):
        with pytest.raises(ValueError, match='holds numbers that are not whole'): labelled([0, odd, 1], np.float32)
