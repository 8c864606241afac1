"""A run's backbone on the Hugging Face Hub, which is a server on this machine here, and as ONNX."""
import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import pytest
import torch
from safetensors import safe_open
from pixcon.export import (export_onnx, from_pretrained, hub_folder, load_backbone, push_to_hub, read_about,
                           read_weights, verify_onnx)
from test_export import features, image, make_run                 # noqa: F401

ROOT = Path(__file__).parent.parent


# The folder

def same_weights(one, two):
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_folder_of_a_repository(make_run, tmp_path):
    "Weights that say how they are loaded, parameters without paths, a card that the Hub can read."
    run = make_run('resnet18')
    out = hub_folder(run, tmp_path/'a'/'b', 'user/name', 'target', 'cc-by-4.0')
    assert {p.name for p in out.iterdir()} >= {'README.md', 'config.json', 'model.safetensors'}
    assert same_weights(from_pretrained(out), load_backbone(run, encoder='target'))
    mode = (out/'README.md').stat().st_mode
    assert (out/'model.safetensors').stat().st_mode == mode        # others may read it, too
    about = read_weights(out/'model.safetensors')[1]
    assert about['use'] == "pixcon.export.from_pretrained('user/name')" and about['encoder'] == 'target'
    config = json.loads((out/'config.json').read_text())
    assert config['backbone'] == 'resnet18' and 'out' not in config
    card = (out/'README.md').read_text()
    assert card.startswith('---\nlicense: cc-by-4.0\n')
    for text in ("from_pretrained('user/name')", "hf_hub_download('user/name', 'model.safetensors')",
                 '| tau | 0.2 |', 'drawn in code', '| encoder | target |', '## Licence'):
        assert text in card, text


def test_a_run_folder_is_a_repository(make_run, tmp_path):
    "Its own backbone.safetensors is found; a folder without weights is refused."
    run = make_run('shufflenet_v2_x1_0', 8, 32)
    with safe_open(run/'backbone.safetensors', 'pt') as f:
        assert torch.equal(from_pretrained(run).conv1[0].weight, f.get_tensor('conv1.0.weight'))
    with pytest.raises(FileNotFoundError, match='has no model.safetensors or backbone.safetensors'):
        from_pretrained(tmp_path)


# The Hub: what its client asks for when it makes a repository, uploads to it and downloads from it

class Hub(BaseHTTPRequestHandler):
    "Keeps the files of commits, and gives them back."
    def log_message(self, *_): pass

    def answer(self, status, content=b'', **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', len(content))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def say(self, **words): self.answer(200, json.dumps(words).encode(), Content_Type='application/json')

    def do_POST(self):
        length = self.headers.get('Content-Length')
        content = self.rfile.read(int(length)) if length else self.read_chunks()
        self.server.asked.append((self.command, self.path, self.headers.get('Authorization')))
        if self.path == '/api/repos/create':
            self.say(url=f'http://{self.headers["Host"]}/user/name', **json.loads(content))
        elif self.path == '/api/validate-yaml':
            self.say(errors=[], warnings=[])
        elif '/preupload/' in self.path:
            files = json.loads(content)['files']
            self.say(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in files])
        elif '/commit/' in self.path:
            for line in map(json.loads, content.splitlines()):
                if line['key'] == 'file':
                    self.server.files[line['value']['path']] = base64.b64decode(line['value']['content'])
            self.say(success=True, commitOid='c'*40, commitUrl=f'http://{self.headers["Host"]}/user/name/commit/{"c"*40}')
        else:
            self.answer(404)

    def read_chunks(self):
        found = b''
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_GET(self):
        self.server.asked.append((self.command, self.path, self.headers.get('Authorization')))
        content = self.server.files.get(self.path.rsplit('/', 1)[-1])
        if '/resolve/' not in self.path or content is None:
            self.answer(404, X_Error_Code='EntryNotFound')
        else:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit='c'*40)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    with ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        server.files, server.asked = {}, []
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


SCRIPT = '''
import sys, torch
from pixcon.export import from_pretrained, load_backbone, push_to_hub
print(push_to_hub(sys.argv[1], 'user/name', licence='cc0-1.0', private=True, token='hf_of_nobody'))
ours, theirs = load_backbone(sys.argv[1]).state_dict(), from_pretrained('user/name').state_dict()
assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())
'''


def test_there_and_back(make_run, tmp_path, hub):
    "The Hub's own client, told by HF_ENDPOINT to talk to this machine: the backbone comes back."
    pytest.importorskip('huggingface_hub')
    address = f'http://127.0.0.1:{hub.server_port}'
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_ENDPOINT=address, HF_HOME=str(tmp_path),
                            HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1')
    done = subprocess.run([sys.executable, '-c', SCRIPT, make_run('shufflenet_v2_x1_0', 8, 32)], env=env,
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:] + str(hub.asked)
    assert done.stdout.splitlines()[-1] == f'{address}/user/name/commit/{"c"*40}'
    assert {'README.md', 'config.json', 'model.safetensors'} <= set(hub.files)
    assert b'license: cc0-1.0' in hub.files['README.md']
    assert all(b'/tmp' not in content for content in hub.files.values())
    posted = [a for a in hub.asked if a[0] == 'POST']
    assert len(posted) >= 3 and {token for _, _, token in posted} == {'Bearer hf_of_nobody'}


def test_without_the_client(make_run, monkeypatch):
    "A sentence that says what to install."
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'pixcon\[hub\]'"):
        push_to_hub(make_run('shufflenet_v2_x1_0', 8, 32), 'user/name')
    with pytest.raises(ValueError, match='needs huggingface_hub'):
        from_pretrained('user/name')


# ONNX

@pytest.fixture(scope='module')
def onnx_file(make_run, tmp_path_factory):
    "A run and its ONNX file."
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)
    run = make_run('shufflenet_v2_x1_0', 8, 32)
    return run, export_onnx(run, tmp_path_factory.mktemp('onnx')/'out')


def test_onnx(onnx_file):
    "Any number of images of any size; the file says what it is, and nothing else is left."
    run, path = onnx_file
    ours = load_backbone(run).eval()
    shapes = [(1, 32, 32), (4, 64, 48), (1, 97, 203), (2, 8, 8)]
    assert 0 <= verify_onnx(path, ours, shapes) <= 1e-5
    about = read_about(path)
    assert about['sizes'] == 'any' and about['layout'] == 'onnx' and about['encoder'] == 'online'
    assert [p.name for p in path.parent.iterdir()] == ['shufflenet_v2_x1_0-online.onnx']


def test_onnx_lines(onnx_file, monkeypatch):
    "The lines that the file carries."
    import onnxruntime
    run, path = onnx_file
    x = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    found = dict(onnxruntime=onnxruntime, image=x.numpy())
    monkeypatch.chdir(path.parent)
    exec(read_about(path)['use'], found)
    ours = features(load_backbone(run), x)
    assert (torch.from_numpy(found['features']) - ours).abs().max() <= 1e-5*ours.abs().max()


def test_onnx_refuses_another_network(onnx_file):
    "The check finds weights that are not ours."
    run, path = onnx_file
    other = load_backbone(run, encoder='target').eval()
    with pytest.raises(ValueError, match='differs from ours by'):
        verify_onnx(path, other, [(1, 32, 32)])


class Decides(torch.nn.Module):
    "Computes something else for wide images, which a recorded graph does not."
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 8, 1)

    def forward(self, x):
        return self.conv(x) if x.shape[3] > 100 else self.conv(x) + 1


def test_onnx_of_a_network_that_decides_by_size(make_run, tmp_path, monkeypatch):
    "The size of the run alone is left, and the file says so."
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)
    from pixcon import export
    about = dict(read_about(make_run('shufflenet_v2_x1_0', 8, 32)/'backbone.safetensors'), backbone='decides')
    monkeypatch.setattr(export, '_ready', lambda *_: (Decides(), about))
    path = export_onnx(tmp_path, tmp_path/'out')
    assert read_about(path)['sizes'] == '32 x 32 pixels only'


def test_onnx_of_a_network_without_a_graph(make_run, tmp_path, monkeypatch):
    "One sentence, and no folder."
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)
    from pixcon import export
    def fail(*_): raise RuntimeError('what it does is no graph\nand a page of advice')
    monkeypatch.setattr(export, '_onnx_program', fail)
    with pytest.raises(ValueError, match="shufflenet_v2_x1_0 can't be written as ONNX: what it does is no graph$"):
        export_onnx(make_run('shufflenet_v2_x1_0', 8, 32), tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_onnx_without_the_libraries(make_run, tmp_path, monkeypatch):
    from pixcon import export
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript and onnxruntime: pip install 'pixcon\[onnx\]'"):
        export_onnx(make_run('shufflenet_v2_x1_0', 8, 32), tmp_path/'out')
    assert not (tmp_path/'out').exists()
