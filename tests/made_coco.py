"""COCO folders and annotations made for the tests of objects and detection."""
import numpy as np
import pytest
from PIL import Image
from pixcon.objects import write_coco
from pixcon.scenes import Scenes


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "A COCO folder of built-in scenes: six to learn from, four to score."
    folder = tmp_path_factory.mktemp('scenes')
    write_coco(Scenes(6, 64, seed=1), folder)
    return write_coco(Scenes(4, 64, seed=2), folder, 'val')


def coco_content(sizes, annotations, ids=(3, 7)):
    "COCO's form for images of some sizes, and two categories."
    images = []
    for i, (h, w) in enumerate(sizes):
        images.append(dict(id=i, file_name=f'{i}.png', height=h, width=w))
    categories = [dict(id=c, name=f'class {c}') for c in ids]
    return dict(images=images, annotations=annotations, categories=categories)


def thing(image, box, category=3, mask=True, **more):
    "One annotation with a box (left, top, width, height) and, as mask, the box's polygon."
    x, y, w, h = box
    a = dict(image_id=image, category_id=category, bbox=list(box), area=w*h, iscrowd=0)
    if mask:
        a['segmentation'] = [[x, y, x+w, y, x+w, y+h, x, y+h]]
    return a | more


def save_images(folder, sizes, mode='RGB'):
    "Noise of some sizes as 0.png, 1.png and so on."
    for i, (h, w) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(folder/f'{i}.png')
