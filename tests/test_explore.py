"""The explorer: its bytes are the modules' numbers, and in JupyterLab and in a page without a kernel it shows them."""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
import nbformat
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.v2.functional import resize
from pixcon.augment import TwoViews
from pixcon.data import stereo_pair
from pixcon.explore import (as_bytes, explore, explore_gallery, from_bytes, look, module, open_photos, similarities,
                            stereo_truth)
from pixcon.loss import info_nce
from pixcon.matching import match_sim, overlap
from pixcon.model import PixCon
from pixcon.reweight import semantic_weights
from pixcon.scenes import Scenes

ROOT = Path(__file__).parent.parent


def array(explorer, told):
    "One array of an explorer."
    kind = '<' + told['kind']
    return torch.tensor(np.frombuffer(explorer.data, kind, told['n'], told['at']))


class Half(nn.Module):
    "A backbone of stride 16 without heads."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 16, 16), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, x): return self.layers(x)


def whole():
    "A PixCon model around it, its encoders different, its queue full."
    torch.manual_seed(1)
    model = PixCon(Half(), hidden=16, dim=8, queue=32, queue_start='random', size=64).eval()
    for p in model.target.parameters(): p.data.mul_(1 + .3*torch.rand_like(p))
    return model


def features(net, photo, size=64):
    "What the views of `explore` give under a network, and their boxes and flips."
    sample = TwoViews([photo], size, 0, scale=(.25, 1.))[0]
    return *look(net, sample['view']), sample['box'][None], sample['flip'][None]


@pytest.mark.parametrize('make', [Half, whole])
def test_bytes_are_the_similarities(make):
    "Both directions, to within half a step; the best match and its cosine to the bit."
    net, photo = make().eval(), Scenes(1, seed=7)[0]
    explorer = explore(net, photo, size=64)
    f_q, f_k, *_ = features(net, photo)
    told, = explorer.about['images'][0]['networks']
    for v in (0, 1):
        index, cosine = match_sim(f_q[v][None], f_k[1-v][None])
        assert torch.equal(array(explorer, told['best'][v]).long(), index[0])
        assert torch.equal(array(explorer, told['cosine'][v]), cosine[0])
        other = told['similar'][v] is None
        x = array(explorer, told['similar'][1-v if other else v]).view(16, 16)
        x, low, high = x.T if other else x, *(told[n][1-v if other else v] for n in ('low', 'high'))
        exact = similarities(f_q[v], f_k[1-v])
        assert (from_bytes(x.numpy(), low, high) - exact).abs().max() <= (high - low)/510 + 1e-6
    assert (told['similar'][1] is None) == (make is Half)


def test_bytes_of_equal_numbers():
    assert torch.equal(from_bytes(*as_bytes(torch.full((2, 3), .25))), torch.full((2, 3), .25))


def test_loss_of_each_tau_is_info_nce():
    "From the numbers that travel, with the queue's keys as negatives and both kinds of positive."
    net, photo = whole(), Scenes(1, seed=7)[0]
    explorer = explore(net, photo, size=64)
    f_q, f_k, *_ = features(net, photo)
    image = explorer.about['images'][0]
    with torch.no_grad():
        for v in (0, 1):
            q = net.online.dense_head(f_q[v][None]).flatten(2).mT[0]
            q = F.normalize(net.dense_predictor(q), dim=1)
            k = net.dense_keys(f_k[1-v][None])[0][0].T
            told = image['networks'][0]['dense'][v]
            assert told['n'] == 32
            for kind in ('best', 'spatial'):
                index = match_sim(f_q[v][None], f_k[1-v][None])[0][0] if kind == 'best' else \
                    array(explorer, image['spatial'][v]).long().clamp(min=0)
                for t, tau in enumerate(explorer.about['taus']):
                    others = array(explorer, told['log_sum']).view(16, -1)[:, t]
                    loss = F.softplus(others - array(explorer, told[kind])/tau)
                    exact = info_nce(q, k[index], net.dense_queue.negatives(), tau)
                    assert torch.allclose(loss, exact, atol=2e-4, rtol=1e-4)


def test_stereo_truth_by_a_slow_loop():
    "Left to right: where the centre lands. Right to left: of the pixels that land there the one that moved farthest."
    rng = np.random.default_rng(0)
    disparity = torch.from_numpy(rng.integers(0, 9, (8, 24)).astype('float32'))
    disparity[torch.from_numpy(rng.random((8, 24)) < .1)] = torch.nan
    there, back = stereo_truth(disparity, (4, 6))
    for cell in range(24):
        line, x = disparity[cell//6*2 + 1].tolist(), cell % 6*4 + 2
        landed = x + .5 - line[x]
        assert there[cell] == (cell//6*6 + int(landed//4) if landed >= 0 else -1)
        seen = [d for p, d in enumerate(line) if abs(p + .5 - d - x) <= 1]
        source = x + max(seen) if seen else 24
        assert back[cell] == (cell//6*6 + int(source//4) if source < 24 else -1)


def test_looking_changes_nothing():
    "Neither mode nor statistics of a user's network."
    net = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.BatchNorm2d(8)).train()
    before = [t.clone() for t in net.state_dict().values()]
    explore(net, Scenes(2), size=64)
    assert net.training and all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values()))


def test_pair_has_no_overlap_but_ground_truth():
    image, = explore(Half(), stereo_pair(), size=96).about['images']
    assert image['inside'] is None and image['truth'] and image['titles'] == ['left photo', 'right photo']
    image, = explore(Half(), stereo_pair()[:2], size=96).about['images']
    assert image['inside'] is None and image['truth'] is None


def test_folder_and_file_of_ones_own(tmp_path):
    from PIL import Image
    for i in range(3): Image.fromarray(Scenes(3)[i].permute(1, 2, 0).numpy()).save(tmp_path/f'street {i}.png')
    assert list(open_photos(tmp_path)) == ['street 0', 'street 1', 'street 2']
    assert torch.equal(open_photos(str(tmp_path/'street 1.png'))['street 1'], Scenes(3)[1])
    assert len(explore_gallery(Half(), tmp_path, size=64).about['images']) == 3


@pytest.mark.parametrize('run, images, error, said', [
    ('nowhere', None, FileNotFoundError, "'kept'"),
    (7, None, TypeError, 'dict of name'), ({}, None, TypeError, 'dict of name'),
    ('kept', [], ValueError, 'no image'), ('kept', torch.zeros(3), ValueError, '(3,H,W)'),
    (nn.Flatten(), None, ValueError, 'one map'), 
    (dict(a=nn.Conv2d(3, 4, 16, 16), b=nn.Conv2d(3, 4, 8, 8)), None, ValueError, 'same cells')])
def test_friendly_errors(run, images, error, said):
    with pytest.raises(error, match=re.escape(said)): explore(run, images)


def test_without_anywidget_the_page_is_shown(monkeypatch):
    "And with somebody in front the widget comes first, page and picture with it."
    explorer = explore(Half(), Scenes(1), size=64)
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    assert list(explorer._repr_mimebundle_()) == ['text/plain', 'text/html', 'image/png']
    monkeypatch.setenv('JPY_SESSION_NAME', 'some.ipynb')
    monkeypatch.setattr('pixcon.explore._widget_class', lambda: __import__('no_anywidget_here'))
    assert list(explorer._repr_mimebundle_()) == ['text/plain', 'text/html', 'image/png']
    monkeypatch.undo()
    pytest.importorskip('anywidget', reason='anywidget is not installed')
    monkeypatch.setenv('JPY_SESSION_NAME', 'some.ipynb')
    assert 'application/vnd.jupyter.widget-view+json' in explorer._repr_mimebundle_()
    from_a_cell = SimpleNamespace(history_manager=SimpleNamespace(hist_file=':memory:'))
    monkeypatch.setattr('IPython.get_ipython', lambda: from_a_cell)  # papermill, called in a notebook
    assert list(explorer._repr_mimebundle_()) == ['text/plain', 'text/html', 'image/png']


def test_page_stands_alone():
    "No address, no name that would reach beyond it, and nothing that could end its script early."
    page = explore(Half(), {'</script><b>': Scenes(1)[0]}, size=64).html()
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|import\s', page)
    assert page.count('</script>') == 2
    told = re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1]
    assert json.loads(told)['about']['images'][0]['name'] == '</script><b>'
    assert not re.search(r'\b(?:window|globalThis|document\.cookie|localStorage|eval)\b', module.read_text())


def test_module_is_package_data():
    assert "'explore.js'" in (ROOT/'setup.py').read_text() and module.is_file()


# in a browser

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
needs_browser = pytest.mark.skipif(not chromium, reason='no chromium on this machine')


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()


def shots(folder):
    "Where screenshots are kept to be looked at: PIXCON_SHOTS, or the test's own folder."
    return Path(os.environ.get('PIXCON_SHOTS', folder))


def point(view, cell, grid):
    "Moves the mouse over a cell of a view."
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    h, w = grid
    view.hover(position=dict(x=(cell % w + .5)*box['width']/w, y=(cell//w + .5)*box['height']/h))


def said(root, name):
    "A line of the table beside the views."
    return root.locator(f'tr[data-name="{name}"] td').inner_text()


def pixels(root):
    "Colours of the similarity map, one for each cell."
    return root.locator('.view.key canvas').evaluate(
        "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")


def check_a_cell(root, photo, net, cell):
    "The page's numbers for a cell are those of the modules."
    f_q, f_k, box, flip = features(net, photo)
    index, cosine = (x[0] for x in match_sim(f_q[:1], f_k[1:]))
    inside = overlap(box, flip, 4)[:, 0].flatten(1)
    weight = semantic_weights(cosine[None], inside)[0]
    point(root.locator('.view.query'), cell, (4, 4))
    assert said(root, 'cell') == f'{cell//4 + 1}, {cell % 4 + 1}'
    best = index[cell].item()
    assert said(root, 'best match') == f'{best//4 + 1}, {best % 4 + 1} · {cosine[cell]:.3f}'
    assert said(root, 'in the overlap') == ('yes' if inside[0, cell] else 'no')
    assert float(said(root, 'SR weight')) == pytest.approx(weight[cell].item(), abs=.002)
    shown = torch.tensor(pixels(root)).view(16, 4)
    row = similarities(f_q[0], f_k[1])[cell]
    assert shown[:, :3].sum(1).argmax() == row.argmax() == best    # magma's brightest colour
    assert shown[:, :3].sum(1).argmin() == row.argmin()
    return shown


def loss_of(net, photo, cell, tau):
    "Dense loss of a cell of view 1."
    f_q, f_k, *_ = features(net, photo)
    with torch.no_grad():
        q = F.normalize(net.dense_predictor(net.online.dense_head(f_q[:1]).flatten(2).mT[0]), dim=1)
        k = net.dense_keys(f_k[1:])[0][0].T
        index = match_sim(f_q[:1], f_k[1:])[0][0]
        return info_nce(q, k[index], net.dense_queue.negatives(), tau)[cell].item()


@needs_browser
def test_page_without_a_kernel(browser, tmp_path):
    "Two explorers in one page: pointing, keys, sliders, pins, swapping; no request, no complaint."
    net, photo = whole(), Scenes(1, seed=7)[0]
    pages = [explore({'first': Half(), 'second': net}, photo, size=64), explore_gallery(Half(), Scenes(4), size=64)]
    path = tmp_path/'page.html'
    path.write_text('<!doctype html><meta charset="utf-8"><body>' + '\n'.join(e.html() for e in pages))
    page = browser.new_page(viewport=dict(width=1280, height=900))
    complaints, asked = [], []
    page.on('console', lambda message: message.type == 'error' and complaints.append(message.text))
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.on('request', lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    first, second = page.locator('[data-pixcon-explore]').all()
    one = check_a_cell(first, photo, net, 6)
    other = check_a_cell(first, photo, net, 9)
    assert not torch.equal(one, other)
    loss = first.locator('[data-name=loss]')
    assert float(loss.inner_text()) == pytest.approx(loss_of(net, photo, 9, .2), abs=.002)
    first.get_by_label('temperature').fill('1')                    # the second stop, 0.07
    assert float(loss.inner_text()) == pytest.approx(loss_of(net, photo, 9, .07), abs=.002)
    first.locator('.view.query').click(position=dict(x=5, y=5))    # pins the first cell
    assert first.locator('.pins tbody tr').count() == 1
    first.locator('.view.query').press('ArrowRight')
    assert said(first, 'cell') == '1, 2'
    first.locator('.view.query').press('1')                        # the first network
    assert 'no heads' in first.locator('.side').inner_text()
    best = said(first, 'best match').split(' ·')[0]
    first.locator('.view.query').press('s')
    assert said(first, 'cell') == best and 'view 2' in first.locator('.query .tag').inner_text()
    point(second.locator('.view.query'), 5, (4, 4))
    f = [look(Half(), resize(Scenes(4)[i], [64, 64])[None])[0][0] for i in range(4)]
    cells = [F.normalize(x.flatten(1), dim=0) for x in f]          # (8,16) each
    cosine = max((cells[0][:, 5] @ x).max().item() for x in cells[1:])
    assert float(second.locator('.tile b').first.inner_text()) == pytest.approx(cosine, abs=.001)
    page.screenshot(path=shots(tmp_path)/'page.png', full_page=True)
    assert not complaints and [url[:5] for url in asked if not url.startswith('data:')] == ['file:']
    page.close()


@needs_browser
def test_on_a_phone(browser, tmp_path):
    "The views stand one above the other, nothing is wider than the screen; one tap points, another pins."
    explore(whole(), Scenes(2, seed=7), size=64).save(tmp_path/'page.html')
    context = browser.new_context(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto((tmp_path/'page.html').as_uri())
    query, key = page.locator('.view.query'), page.locator('.view.key')
    top, below = query.bounding_box(), key.bounding_box()
    assert below['y'] > top['y'] + top['height'] and top['width'] > 330
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    query.tap(position=dict(x=5, y=5))
    assert said(page, 'cell') == '1, 1' and not page.locator('.pins tr').count()
    query.tap(position=dict(x=5, y=5))
    assert page.locator('.pins tbody tr').count() == 1
    before = said(page, 'best match')
    page.get_by_role('button', name='image 2').tap()
    assert said(page, 'best match') != before and not page.locator('.pins tr').count()
    context.close()


@contextlib.contextmanager
def jupyterlab(folder):
    "The address of a JupyterLab whose files are those of a folder."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    names = 'HOME', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR'
    own = {name: str(folder/'.own') for name in names}
    environment = os.environ | own | dict(PYTHONPATH=f"{ROOT}:{ROOT/'tests'}", OMP_NUM_THREADS='1')
    environment.pop('JPY_SESSION_NAME', None)
    log = open(folder/'server.log', 'w')
    server = subprocess.Popen(
        [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}',
         '--ServerApp.port_retries=0',
         '--IdentityProvider.token=', '--ServerApp.disable_check_xsrf=True', f'--ServerApp.root_dir={folder}',
         '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
        cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            assert server.poll() is None, (folder/'server.log').read_text()
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1): break
            time.sleep(.1)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(10)
        log.close()


def run_cell(page, i):
    "Runs a cell, again where the page was not ready for the key."
    cell = page.locator('.jp-Notebook .jp-CodeCell').nth(i)
    cell.wait_for(timeout=60_000)
    for _ in range(20):
        cell.locator('.cm-content').click(timeout=60_000)
        page.keyboard.press('Shift+Enter')
        page.wait_for_timeout(2000)
        if cell.locator('.jp-InputPrompt').inner_text().strip() != '[ ]:': return


@needs_browser
def test_in_jupyterlab(browser, tmp_path):
    "A notebook is run: the widget has the modules' numbers and tells Python; the page's HTML lives there, too."
    pytest.importorskip('anywidget', reason='anywidget is not installed')
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed')
    cells = ['from test_explore import *\nexplorer = explore(whole(), Scenes(1, seed=7)[0], size=64)\nexplorer',
             "from IPython.display import HTML\nprint('state', explorer.widget().state['cell'])\nHTML(explorer.html())"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(notebook, tmp_path/'look.ipynb')
    net, photo = whole(), Scenes(1, seed=7)[0]
    with jupyterlab(tmp_path) as address:
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.goto(f'{address}/lab/tree/look.ipynb?reset', timeout=60_000)
        run_cell(page, 0)
        widget = page.locator('.jp-OutputArea-output .root').first
        widget.locator('.view.query').wait_for(timeout=120_000)
        one = check_a_cell(widget, photo, net, 6)
        assert not torch.equal(one, check_a_cell(widget, photo, net, 9))
        loss = float(widget.locator('[data-name=loss]').inner_text())
        assert loss == pytest.approx(loss_of(net, photo, 9, .2), abs=.002)
        page.screenshot(path=shots(tmp_path)/'lab.png')
        run_cell(page, 1)
        alive = page.locator('[data-pixcon-explore]')
        alive.locator('.view.query').wait_for(timeout=30_000)
        assert page.get_by_text('state 9', exact=True).is_visible()
        check_a_cell(alive, photo, net, 2)
        page.close()
