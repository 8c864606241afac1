"""What `pip install pixcon` would bring: the two distributions, their contents and what they say of themselves."""
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
import pytest
import yaml
import pixcon

ROOT = Path(__file__).parent.parent
settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
TRAINED = {f'pixcon/trained/{p.name}' for p in (ROOT/'pixcon'/'trained').iterdir()}
MODULES = {f'pixcon/{p.name}' for p in (ROOT/'pixcon').glob('*.py')}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Wheel and source distribution, the wheel made from the other, in a folder of links: nothing is written here."
    pytest.importorskip('build')
    project, out = tmp_path_factory.mktemp('project'), tmp_path_factory.mktemp('dist')
    for path in ROOT.iterdir():
        if path.name not in ('build', 'dist', '.git', 'runs') and path.suffix != '.egg-info':
            (project/path.name).symlink_to(path)
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', out, project],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob('*.whl')), next(out.glob('*.tar.gz'))


def test_wheel(built):
    "The modules, the small trained network and the licence; no notebooks, no tests."
    assert built[0].name == f'pixcon-{settings["version"]}-py3-none-any.whl'
    names = set(zipfile.ZipFile(built[0]).namelist())
    assert {n for n in names if n.startswith('pixcon/')} == MODULES | TRAINED | {'pixcon/explore.js'}
    assert {n.split('/', 1)[1] for n in names if '.dist-info/' in n} >= {'METADATA', 'licenses/LICENSE'}
    assert {n.split('/')[0] for n in names} == {'pixcon', f'pixcon-{settings["version"]}.dist-info'}


def test_wheel_trains(built, tmp_path):
    "Unpacked far from the notebooks, `python -m pixcon.training` runs, and the kept network loads."
    zipfile.ZipFile(built[0]).extractall(tmp_path/'site')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path/'site'), 'CUDA_VISIBLE_DEVICES': ''}
    def call(*words):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout
    tiny = '--data scenes --scenes 8 --batch 4 --epochs 1 --hidden 8 --dim 4 --size 32 --out run'
    call('-m', 'pixcon.training', *tiny.split())
    assert (tmp_path/'run'/'backbone.safetensors').exists()
    said = call('-c', 'import pixcon.encoder as e; e.kept_backbones(); print(e.__file__)')
    assert said.strip() == str(tmp_path/'site'/'pixcon'/'encoder.py')


def test_source_distribution(built):
    "The same and what setup.py reads; under 1 MB."
    names = {n.split('/', 1)[1] for n in tarfile.open(built[1]).getnames() if '/' in n}
    needed = {'settings.ini', 'setup.py', 'README.md', 'LICENSE', 'CITATION.cff'}
    assert MODULES | TRAINED | needed <= names
    assert not [n for n in names if n.startswith(('tests', 'nbs', '.'))]
    assert built[1].stat().st_size < 1_000_000


def test_metadata(built):
    "Version, licence, what it needs, extras, addresses; a long description whose links lead somewhere on an index."
    wheel = zipfile.ZipFile(built[0])
    said = message_from_string(wheel.read(f'pixcon-{settings["version"]}.dist-info/METADATA').decode())
    assert said['Version'] == settings['version'] == pixcon.__version__
    assert 'Apache-2.0' in (said['License'], said['License-Expression'])
    assert said['Requires-Python'] == '>=' + settings['min_python']
    needs = said.get_all('Requires-Dist')
    always = {re.match(r'[\w-]+', n)[0] for n in needs if 'extra ==' not in n}
    assert always == {re.match(r'[\w-]+', n)[0] for n in settings['requirements'].split()}
    assert set(said.get_all('Provides-Extra')) >= {'dev', 'onnx', 'hub', 'frameworks'}
    dev = {n.split(';')[0] for n in needs if 'extra == "dev"' in n}
    assert {'onnxruntime', 'huggingface_hub', 'pytest'} <= dev
    assert any(u.startswith('Source, https://') for u in said.get_all('Project-URL'))
    assert all(' :: ' in c for c in said.get_all('Classifier'))
    links = re.findall(r'\]\(([^)\s]+)\)', said.get_payload())
    assert links and all(re.match(r'\w+:|#', link) for link in links)


def test_citation():
    "CITATION.cff has this version, and both papers as the README has them."
    cited = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert cited['cff-version'] == '1.2.0' and cited['version'] == settings['version']
    assert cited['repository-code'] == settings['git_url'] and cited['license'] == 'Apache-2.0'
    readme = (ROOT/'README.md').read_text()
    for paper in cited['references']:
        assert paper['title'] in readme and paper['url'] in readme
        names = [a['family-names'] for a in paper['authors']]
        assert names == ['Pang', 'Nakashima', 'Otani', 'Nagahara'] and all(n in readme for n in names)


def test_workflow_runs_what_is_there():
    "The jobs of .github/workflows name scripts, extras and tests that exist."
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yml').read_text())['jobs']
    commands = [step['run'] for job in jobs.values() for step in job['steps'] if 'run' in step]
    assert 'bash .ci/run' in commands
    for path in re.findall(r'tests/\w+\.py', '\n'.join(commands)): assert (ROOT/path).exists(), path
    for extras in re.findall(r"'\.\[([\w,]+)\]'", '\n'.join(commands)):
        for extra in extras.split(','): assert f'{extra}_requirements' in settings
