"""Cases of test_fake_cuda.py, in a process of their own: `python tests/fake_cuda_steps.py 'step amp=fp16' norms`."""
import json
import sys
import tempfile
import traceback
from dataclasses import replace

import torch

import fake_cuda
from pixcon import augment, config, distributed, matching, model, run, segment, training

PAPER = dict(data='scenes', recipe='paper', scenes=4096, backbone='resnet18', batch=64, hidden=64,
             epochs=10, compile='off')
CROPS = dict(data='scenes', recipe='voc12aug', backbone='resnet50', batch=4, short=64, crop_height=64,
             crop_width=64, iterations=10, labelled=8, test=4)


def given_by(words, kind, usual):
    "Parameters from words such as batch=64, over the usual ones, in a new run folder."
    flags = [f'--{w}' for w in words if '=' in w and not w.startswith('plant=')]
    out = tempfile.mkdtemp() + '/run'
    return usual | config.command_line(kind, 'fake_cuda_steps', flags) | dict(out=out)


def part_of(c): # PretrainConfig
    "What the loader gives for one part of a batch, on the CPU."
    n = c.batch//c.accumulate
    box = torch.tensor([[0, 0, 64, 50], [16, 30, 64, 64]]).expand(n, 2, 4)
    view = torch.zeros(n, 2, 3, c.size, c.size, dtype=torch.uint8)
    view = {} if c.cache == 'device' else dict(view=view)          # cut there
    return dict(**view, box=box, flip=torch.rand(n, 2) < .5, draw=torch.rand(n, 2, 13),
                index=torch.arange(n), asked=torch.arange(n))


def parts_of(c): return tuple(part_of(c) for _ in range(c.accumulate))


def quiet(mode):
    "Fails if anything was seen that must not happen in a step."
    assert not mode.seen, '\n'.join(sorted(set(mode.seen)))


def queues(net): return net.image_queue, net.dense_queue


def on_the_host(module):
    "Names of the parameters and buffers that are not on the GPU."
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {n for n, t in tensors.items() if t.device.type != 'cuda'}


def pretraining(words):
    "A pre-training on the fake GPU, its queues nearly full."
    c, images = training.configure(**given_by(words, config.PretrainConfig, PAPER))
    made = training.Pretraining(c, images)
    made.run.statistics = [b.clone() for b in made.run.running()]
    if c.cache == 'device': made.kept()
    for queue in queues(made.model):
        assert queue.pointer.device.type == queue.filled.device.type == 'cpu'
        queue.pointer, queue.filled = torch.tensor(0), torch.tensor(c.queue - 96)
    return made


def step(mode, words):
    made = pretraining(words)
    c = made.config
    plant(made, dict(w.split('=', 1) for w in words if w.startswith('plant=')).get('plant'))
    made.train_step(parts_of(c))                                   # chooses the attention kernel, by numbers, once
    for _ in range(3):
        mode.seen.clear()
        made.train_step(parts_of(c))
        quiet(mode)
    assert made.run.step == 4 and made.model.image_queue.filled.item() == c.queue
    fixed = {f'{q}_queue.{n}' for q in ('image', 'dense') for n in ('pointer', 'filled')}
    assert on_the_host(made.model) == fixed
    assert torch.backends.cudnn.deterministic == c.deterministic != torch.backends.cudnn.benchmark
    return made


def log(mode, words):
    "A line of the log reads few values, however many layers there are."
    made = step(mode, words)
    mode.seen.clear()
    made.run.check_gradients()
    reads = {s for s in mode.seen if 'copy to the host' in s or '_local_scalar_dense' in s}
    assert 1 <= len(reads) <= 3, reads                             # a list of values is read at once
    made.log_line(made.train_step(parts_of(made.config)))


def resume(mode, words):
    "The state of a run on a CPU, in another number format, goes on here."
    made = pretraining(words)
    made.train_step(parts_of(made.config))
    state = {n: p.state_dict() for n, p in made.run.parts.items()}
    per_layer = state['optimizer']['state']
    for values in per_layer.values():
        for n, v in values.items():
            if v.ndim == 4: values[n] = v.contiguous()             # as float32 on a CPU leaves it
    state = torch.utils._pytree.tree_map(to_host, state)
    again = pretraining(words)
    run.load_optimizer(again.optimizer, state['optimizer'])
    again.train_step(parts_of(again.config))
    mode.seen.clear()
    again.train_step(parts_of(again.config))
    quiet(mode)


def to_host(t):
    "A tensor's stand-in on the CPU, in the same layout."
    if not isinstance(t, fake_cuda.FakeTensor): return t
    return torch.ones(t.shape, dtype=t.dtype).as_strided(t.shape, t.contiguous().stride())


def segmentation(mode, words):
    "Steps of a fine-tuning for segmentation."
    c, train, val = segment.configure_segment(**given_by(words, segment.SegmentConfig, CROPS))
    net = segment.make_segmenter(c, c.classes).to('cuda').train()
    segment.share_dropout(net)
    optimizer = run.make_optimizer(c.optimizer, segment.parameter_groups(net, c), c.lr, c.weight_decay)
    scaler = torch.amp.GradScaler('cuda', enabled=run.precision(c.amp, 'cuda') == torch.float16)
    for k in range(3):
        image = torch.zeros(4, 3, 64, 64, dtype=torch.uint8).to('cuda', non_blocking=True)
        label = torch.zeros(4, 64, 64, dtype=torch.uint8).to('cuda', non_blocking=True)
        mode.seen.clear()
        segment.train_step(net, optimizer, scaler, image, label, k, c)
        quiet(mode)
    assert not on_the_host(net)


def norms(mode, words):
    "Batch norm with the statistics of all processes, in both formats and layouts."
    norm = distributed.share_norms(torch.nn.BatchNorm2d(8)).to('cuda')
    for dtype in (torch.float, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.zeros(4, 8, 6, 6, device='cuda', dtype=dtype).to(memory_format=layout).requires_grad_()
            mode.seen.clear()
            count, mean, var = distributed._statistics(x.detach())
            norm.remember(count, mean, var)
            parameters = norm.weight, norm.bias, count.float(), mean.float(), var.float(), norm.eps
            y = distributed._Normalise.apply(x, *parameters)
            y.float().sum().backward()
            quiet(mode)
            assert y.dtype == x.grad.dtype == dtype and y.stride() == x.stride() == x.grad.stride()


# ---- bugs, planted to see that they are found

def plant(made, bug):
    "Puts one of the bugs of test_fake_cuda.py into a training."
    net, own = made.model, model.PixCon.match
    def host_index(self, *a, **k):
        index, *rest = own(self, *a, **k)
        return index + torch.arange(index.shape[-1]), *rest
    def read_loss(*views, net=made.net, **given):
        loss, out = net(*views, **given)
        assert loss.item()
        return loss, out
    def mask(*views, net=made.net, **given):
        loss, out = net(*views, **given)
        return loss + 0*out['similarity'][out['inside']].sum(), out
    def on_the_way(box, centres, index, grid, max_dist, own=matching._within):
        return own(box/torch.tensor(1., device=box.device), centres, index, grid, max_dist)
    def blocking(view, draw, own=made.photometric):
        return own(view, draw) + 0*torch.rand(len(view), 1, 1, 1, 1).to('cuda')
    if bug == 'host-index': model.PixCon.match = host_index
    if bug == 'copy-of-a-number': matching._within = on_the_way
    if bug == 'read-loss': made.net = read_loss
    if bug == 'mask': made.net = mask
    if bug == 'blocking-copy': made.photometric = blocking
    if bug == 'queue-on-the-host': net.dense_queue.keys = torch.zeros(tuple(net.dense_queue.keys.shape))
    if bug == 'momentum-layout':
        for values in made.optimizer.state.values():
            for n, v in values.items(): values[n] = v.contiguous()


def files(mode, words):
    "A batch of files that the device has decoded is cut there, without a wait."
    def decode(files): return [torch.zeros(3, 96, 96 + len(f), dtype=torch.uint8, device='cuda') for f in files]
    part = part_of(config.PretrainConfig(batch=8))
    part |= dict(file=torch.ones(36, dtype=torch.uint8), shape=[[n] for n in range(1, 9)])
    for _ in range(2):
        mode.seen.clear()
        view = augment.cut_files(part, 32, decode, 'cuda')
        quiet(mode)
    assert view.device.type == 'cuda' and view.shape == (8, 2, 3, 32, 32)


KINDS = dict(files=files, step=step, log=log, resume=resume, segment=segmentation, norms=norms)


def said_by(case):
    "'well', or the traceback of a case."
    kind, *words = case.split()
    own = model.PixCon.match, matching._within
    mode = fake_cuda.FakeCuda()
    try:
        with mode: KINDS[kind](mode, words)
    except Exception: return traceback.format_exc()
    finally: model.PixCon.match, matching._within = own
    return 'well'


def main(cases):
    torch.set_num_threads(1)
    fake_cuda.arm()
    print(json.dumps({case: said_by(case) for case in cases}))


if __name__ == '__main__': main(sys.argv[1:])
