"""On a real GPU: `pytest -m cuda`. Everywhere else all of it is skipped, and test_fake_cuda.py stands in."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import to_pil_image
from pixcon import augment, data, distributed, loss, run, training
from pixcon.scenes import Scenes

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU, and pytest -m cuda')]

TINY = dict(data='scenes', scenes=16, scene_size=64, recipe='small', backbone='resnet18', stride=16, size=64, batch=8, epochs=4,
            hidden=32, dim=16, queue=16, queue_start='random', dense_start=0., workers=0, optimizer='sgd', lr=.05, log_steps=1)


def made(out, **given): return training.Pretraining(*training.configure(**{**TINY, 'out': str(out)} | given))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    "float32 products without TF32, to compare with a CPU's."
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)


@pytest.mark.parametrize('dtype,wanted', [(torch.bfloat16, '_cuda_flash'), (torch.float16, '_cuda_flash'), (torch.float, '_cuda_efficient')])
def test_a_fused_kernel_is_found(dtype, wanted):
    assert loss._kernel('cuda', dtype, 128).__name__ == wanted


@pytest.mark.parametrize('amp,close', [(None, 1e-4), (torch.bfloat16, 3e-2)])
def test_loss(amp, close):
    "Value and gradient of the loss written out, at the paper's queue."
    q, pos, queue = (F.normalize(torch.randn(n, 128, device='cuda'), dim=1) for n in (2048, 2048, 65536))
    found = []
    for nce in (loss.info_nce_plain, loss.info_nce):
        own = q.clone().requires_grad_()
        with run.autocast('cuda', amp if nce is loss.info_nce else None): value = nce(own, pos, queue).mean()
        value.backward()
        found.append((value.item(), own.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=close)
    assert (found[0][1] - found[1][1]).norm() < close*found[0][1].norm()


@pytest.mark.parametrize('variant', [dict(), dict(matching='coord', max_dist=.7), dict(reweight=False), dict(dense_weight=0.), dict(accumulate=2)])
def test_first_steps_are_those_of_a_cpu(tmp_path, monkeypatch, variant):
    "In float32, to the noise of other sums."
    losses = []
    for device in ('cpu', 'cuda'):
        monkeypatch.setattr(training, 'device', lambda device=device: device)
        own = made(tmp_path/device, amp='off', **variant)
        outs = [own.train_step(parts) for _, parts in zip(range(3), own.steps())]
        losses.append([(o['loss_image'] + o['loss_dense']).item() for o in outs])
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_files_decoded_on_the_gpu(tmp_path):
    "Smooth photos as the CPU decodes them, to a few grey levels; boxes, draws and images are the same."
    for n, photo in data.sample_photos().items(): to_pil_image(photo).save(tmp_path/f'{n}.jpg', quality=95)
    given = dict(data=str(tmp_path), recipe='small', batch=4, queue=4, cache='off')
    usual, ours = (made(tmp_path/decode, **given | dict(decode=decode)) for decode in ('cpu', 'device'))
    for (a,), (b,) in zip(usual.steps(), ours.steps()):
        assert b['view'].device.type == 'cuda' and all(torch.equal(b[n], a[n]) for n in ('box', 'flip', 'draw', 'index'))
        assert (b['view'].cpu().int() - a['view'].int()).abs().float().mean() < 2


@pytest.mark.parametrize('amp', ['off', 'bf16', 'fp16'])
def test_a_run_goes_on_with_the_same_bits(tmp_path, amp):
    "With deterministic on, cut off after two of eight steps."
    whole = made(tmp_path/'whole', amp=amp, deterministic=True)
    whole.fit()
    cut = made(tmp_path/'cut', amp=amp, deterministic=True)
    cut.begin()
    for _, parts in zip(range(2), cut.steps()): cut.train_step(parts)
    cut.run.save()
    again = made(tmp_path/'cut', amp=amp, deterministic=True)
    again.fit()
    theirs = whole.model.state_dict()
    for n, t in again.model.state_dict().items(): assert torch.equal(t, theirs[n]), n


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype,close', [(torch.float, 1e-4), (torch.bfloat16, 3e-2)])
def test_shared_batch_norm(dtype, close, layout):
    "Normalising by given statistics, and its gradients, as torch's own batch norm."
    x = (3*torch.randn(6, 8, 7, 5, device='cuda') + 2).to(dtype).to(memory_format=layout)
    goal, found = torch.randn_like(x), []
    for ours in (False, True):
        norm, given = torch.nn.BatchNorm2d(8).cuda(), x.clone().requires_grad_()
        count, mean, var = distributed._statistics(x)
        told = norm.weight, norm.bias, count.float(), mean.float(), var.float(), norm.eps
        y = distributed._Normalise.apply(given, *told) if ours else norm(given)
        (y*goal).sum().backward()
        found.append((y.float(), given.grad.float(), norm.weight.grad, norm.bias.grad))
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=close, atol=close*a.abs().max().item())


def test_views_cut_there():
    "To one grey level of torchvision's on the CPU."
    images = Scenes(8, 200)
    resident = augment.Resident(images, 'cuda')
    usual, ours = augment.TwoViews(images, 96, seed=1), augment.TwoViews(resident, 96, seed=1, pixels=False)
    batch = torch.utils.data.default_collate([ours[3, i] for i in range(8)])
    view = resident.views(batch['index'], batch['box'], batch['flip'], (96, 96)).cpu()
    for i in range(8): assert (view[i].int() - usual[3, i]['view'].int()).abs().max() <= 1


def test_out_of_memory_names_what_fits(tmp_path):
    own = made(tmp_path/'run', scenes=65536, batch=65536, size=224, stride=0, backbone='resnet50', recipe='paper', queue=1024)
    assert 'accumulate' in training.too_large(own)
