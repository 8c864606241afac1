"""The contract that every notebook keeps, so that it reads, exports, tests and runs under papermill alike."""
import ast
import configparser
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
import pytest
from pixcon.training import Config

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
PAPERMILL = [p for p in NOTEBOOKS if p.stem in ('train', 'finetune_segment', 'finetune_detect', 'results', 'benchmark')]
name = lambda p: p.stem


def cells(path, kind=None):
    "Cells of a notebook, of one kind if given."
    return [c for c in json.loads(path.read_text())['cells'] if kind in (None, c['cell_type'])]


def source(cell): return ''.join(cell['source'])


def exported(path):
    "Source of the exported cells."
    return [source(c) for c in cells(path, 'code') if re.match(r'#\s*\|\s*export', source(c))]


def own_imports(code):
    "Modules of the package that code imports."
    return {m.split('.')[1] for node in ast.walk(ast.parse(code)) for m in ([node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else
            [a.name for a in node.names] if isinstance(node, ast.Import) else []) if m and m.startswith('pixcon.')}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_opens_with_title_and_one_line(path):
    "`# title`, blank, `> one line`: it becomes the module's docstring."
    first = cells(path)[0]
    assert first['cell_type'] == 'markdown' and re.match(r'# \S+\n\n> .+', source(first))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_is_clean(path):
    "Runs under papermill (a language), no execution counts, no empty last cell, no error left in the outputs, under 1 MB."
    assert path.stat().st_size < 1_000_000
    assert json.loads(path.read_text())['metadata']['kernelspec']['language'] == 'python'
    assert source(cells(path)[-1]).strip()
    for c in cells(path, 'code'):
        assert c['execution_count'] is None
        assert not any(o['output_type'] == 'error' for o in c['outputs'])
    assert any(c['outputs'] for c in cells(path, 'code')), 'never executed'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_speaks_of_no_machine(path):
    "No path of the machine that made the outputs, except in a temporary folder."
    assert not re.search(r'/(?:home|root|work|Users|mnt)/', path.read_text())


@pytest.mark.parametrize('path', NUMBERED, ids=name)
def test_module_and_notebook_belong_together(path):
    "Notebook NN_name exports pixcon/name.py, and its exported cells are short."
    module = path.stem.split('_', 1)[1]
    assert f'#| default_exp {module}' in [source(c).strip() for c in cells(path, 'code')]
    assert (ROOT/'pixcon'/f'{module}.py').exists()
    for code in exported(path): assert len(code.splitlines()) <= 45, code.splitlines()[1]


def test_every_module_has_a_notebook():
    "Deleting a notebook leaves its module behind: found here."
    modules = {p.stem for p in (ROOT/'pixcon').glob('*.py') if not p.stem.startswith('_')}
    assert modules == {p.stem.split('_', 1)[1] for p in NUMBERED}


@pytest.mark.parametrize('path', NUMBERED, ids=name)
def test_imports_point_down(path):
    "An exported import names only notebooks of a lower number; matching, reweight and loss import nothing of ours."
    number = {p.stem.split('_', 1)[1]: p.stem.split('_')[0] for p in NUMBERED}
    module = path.stem.split('_', 1)[1]
    found = own_imports('\n'.join(exported(path)))
    assert all(number[m] < number[module] for m in found), found
    if module in ('matching', 'reweight', 'loss'): assert not found


@pytest.mark.parametrize('path', PAPERMILL, ids=name)
def test_papermill_parameters(path):
    "Exactly one tagged cell; every line is `name:type = value # why`."
    tagged = [c for c in cells(path, 'code') if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    for line in source(tagged[0]).splitlines(): assert re.match(r"\w+:\w+ = .+?\s+# \S", line), line


def test_train_offers_every_parameter():
    "The parameters cell has Config's names and types, and how many processes to start."
    tagged, = (c for c in cells(ROOT/'nbs'/'train.ipynb', 'code') if 'parameters' in c['metadata'].get('tags', []))
    assert dict(re.findall(r'^(\w+):(\w+) =', source(tagged), re.M)) == {f.name: f.type.__name__ for f in fields(Config)} | dict(processes='int')


def test_readme_names_real_parameters():
    "Every -p of the README is a parameter, every notebook it names exists, and the two commands stand in it."
    readme = (ROOT/'README.md').read_text()
    for notebook, rest in re.findall(r'papermill (nbs/\w+\.ipynb)(.*)', readme):
        code = '\n'.join(source(c) for c in cells(ROOT/notebook, 'code') if 'parameters' in c['metadata'].get('tags', []))
        for p in re.findall(r'-p (\w+)', rest): assert re.search(rf'^{p}:', code, re.M), p
    for command in ('pip install -e . && papermill nbs/train.ipynb out.ipynb', "pip install -e '.[dev]' && nbdev_test && pytest"):
        assert command in readme.splitlines()


def test_readme_is_the_index(tmp_path):
    "README.md and its pictures are what nbconvert makes of nbs/index.ipynb."
    subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'markdown', '--output', 'README', '--output-dir', tmp_path,
                    '--NbConvertApp.output_files_dir=nbs/images', ROOT/'nbs'/'index.ipynb'], check=True, capture_output=True, timeout=120)
    assert (tmp_path/'README.md').read_text() == (ROOT/'README.md').read_text()
    made = {p.name: p.read_bytes() for p in (tmp_path/'nbs'/'images').glob('*')}
    assert made == {p.name: p.read_bytes() for p in (ROOT/'nbs'/'images').glob('*')}


def test_settings_keep_the_parameters_tag():
    "Without this line nbdev_clean drops the tag, and papermill silently runs with the defaults."
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    assert settings['DEFAULT']['allowed_cell_metadata_keys'] == 'tags' and settings['DEFAULT']['clear_all'] == 'False'
