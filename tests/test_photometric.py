"""Each photometric operator, alone and through the whole module, against torchvision's."""
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from pixcon.augment import Photometric, denormalise
from pixcon.data import sample_photos

OFF, SIZE = .999, 64
PHOTO = tvf.resize(sample_photos()['coffee'], [SIZE, SIZE], antialias=True)     # (3,S,S)
SOFT = (PHOTO.float()*.4 + 60).byte()              # no operator leaves the range from here
JITTERS = [(1, tvf.adjust_brightness, .4), (2, tvf.adjust_contrast, .4), (3, tvf.adjust_saturation, .2)]


def through(draws, photo=SOFT, view=0, **kwargs):
    "A view after the module with all operators off but the given draws, and the view before, both in [0,1]."
    draw = torch.full((1, 2, 13), OFF)
    draw[..., 1:5] = .5                            # strengths at no change
    draw[..., 9:] = torch.arange(4.)/10            # jitters in order
    for place, value in draws.items(): draw[0, view, place] = value
    photometric = Photometric(**dict(blur=(0., 0.), solarize=(0., 0.)) | kwargs)
    made = photometric(photo.expand(1, 2, -1, -1, -1), draw)
    return denormalise(made)[0, view], photo.float()/255


@pytest.mark.parametrize('value', [0., .25, .8, 1.])
@pytest.mark.parametrize('place,operator,strength', JITTERS)
def test_jitter(place, operator, strength, value):
    "Brightness, contrast and saturation to rounding."
    ours, before = through({0: 0., place: value})
    theirs = operator(before, 1 + strength*(2*value - 1))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize('turn', [-.1, -.03, .05, .1])
def test_hue(turn):
    """A rotation in YIQ: luma stays, colourfulness stays, and the angle is the one asked for.
    torchvision's HSV turn goes the same way round."""
    ours, before = through({0: 0., 4: (turn/.1 + 1)/2})
    yiq = torch.tensor([[.299, .587, .114], [.5959, -.2746, -.3213], [.2115, -.5227, .3112]])
    a, b = (yiq @ x.flatten(1) for x in (before, ours))                        # (3,S*S)
    torch.testing.assert_close(a[0], b[0], atol=2e-3, rtol=0)
    colour_a, colour_b = torch.complex(*a[1:]), torch.complex(*b[1:])
    torch.testing.assert_close(colour_a.abs(), colour_b.abs(), atol=2e-3, rtol=0)
    strong = colour_a.abs() > .05
    angle = (colour_b/colour_a)[strong].angle()/(2*torch.pi)
    assert strong.sum() > 100 and (angle + turn).abs().max() < 2e-3
    off = lambda other: (ours - tvf.adjust_hue(before, other)).abs().mean()
    assert off(turn) < off(-turn)


def test_greyscale():
    "The three channels are torchvision's grey."
    ours, before = through({5: 0.})
    torch.testing.assert_close(ours, tvf.rgb_to_grayscale(before, 3), atol=2e-5, rtol=0)


@pytest.mark.parametrize('sigma', [.1, .5, 1.3, 2.])
def test_blur(sigma):
    "The 23-tap Gaussian with reflected borders."
    ours, before = through({6: 0., 7: (sigma - .1)/1.9}, PHOTO, blur=(1., 1.))
    theirs = tvf.gaussian_blur(before, [23, 23], [sigma, sigma])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('value', [0, 127, 128, 255])
def test_solarize(value):
    "From 128 up values are inverted, and only in the view that may be."
    flat = torch.full((3, SIZE, SIZE), value, dtype=torch.uint8)
    ours, _ = through({8: 0.}, flat, view=1, solarize=(0., 1.))
    theirs = tvf.solarize(flat, 128).float()/255
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    other, before = through({8: 0.}, flat, view=0, solarize=(0., 1.))
    torch.testing.assert_close(other, before, atol=2e-5, rtol=0)
