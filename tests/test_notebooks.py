"""The contract that every notebook keeps, so that it reads, exports, tests and runs under papermill alike."""
import ast
import base64
import configparser
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
import pytest
from pixcon.config import PretrainConfig

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
METHOD = [p for p in NUMBERED if p.name[:2] <= '08']
PLAIN = ('index', 'quickstart')                                   # unnumbered, read and run but without parameters
PAPERMILL = [p for p in NOTEBOOKS if not p.name[0].isdigit() and p.stem not in PLAIN]
MAP = '''00_plot 01_data 02_scenes 03_augment 04_encoder 05_matching 06_reweight 07_loss 08_model 09_config 10_run
         11_distributed 12_training 13_plan 14_explore 15_labelled 16_probe 17_segment 18_objects 19_detect 20_export
         21_keypoints 22_study 23_watch'''.split()


def stem(path): return path.stem


def each(paths): return pytest.mark.parametrize('path', paths, ids=stem)


def cells(path, kind=None):
    "Cells of a notebook, of one kind if given."
    return [c for c in json.loads(path.read_text())['cells'] if kind in (None, c['cell_type'])]


def source(cell): return ''.join(cell['source'])


def exported(path):
    "Source of the exported cells."
    return [source(c) for c in cells(path, 'code') if re.match(r'#\s*\|\s*export', source(c))]


def imports(code):
    "Pairs of module and name that code imports from the package."
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('pixcon.'):
            found += [(node.module.split('.')[1], a.name) for a in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == 'pixcon':
            found += [(a.name, a.name) for a in node.names if not a.name.startswith('__')]
        if isinstance(node, ast.Import):
            found += [(a.name.split('.')[1], a.name) for a in node.names if a.name.startswith('pixcon.')]
    return found


def code_of(path):
    "All code of a notebook that Python can parse."
    lines = [line for c in cells(path, 'code') for line in source(c).splitlines()]
    return '\n'.join(line for line in lines if not line.startswith(('%', '!')))


def parameters(path):
    "The cell that papermill fills in."
    return [c for c in cells(path, 'code') if 'parameters' in c['metadata'].get('tags', [])]


def test_map():
    "The rooms of the house, one idea each."
    assert [p.stem for p in NUMBERED] == MAP


@each(NOTEBOOKS)
def test_opens_with_title_and_one_line(path):
    "`# title`, blank, `> one line`: it becomes the module's docstring."
    first = cells(path)[0]
    assert first['cell_type'] == 'markdown' and re.match(r'# \S+\n\n> .+', source(first))


@each(NOTEBOOKS)
def test_is_clean(path):
    "Runs under papermill (a language), no execution counts, no empty last cell, no error in the outputs, under 1 MB."
    assert path.stat().st_size < 1_000_000
    assert json.loads(path.read_text())['metadata']['kernelspec']['language'] == 'python'
    assert source(cells(path)[-1]).strip()
    for c in cells(path, 'code'):
        assert c['execution_count'] is None
        assert not any(o['output_type'] == 'error' for o in c['outputs'])
    assert any(c['outputs'] for c in cells(path, 'code')), 'never executed'
    ids = [c['id'] for c in cells(path)]
    assert len(set(ids)) == len(ids)


@each(NOTEBOOKS)
def test_speaks_of_no_machine(path):
    "No path of the machine that made the outputs, except in a temporary folder."
    assert not re.search(r'/(?:home|root|work|Users|mnt)/', path.read_text())


@each(NOTEBOOKS)
def test_links_are_alive(path):
    "Links to files, relative to nbs/."
    for c in cells(path, 'markdown'):
        for link in re.findall(r'\]\((?!\w+:|#)([^)\s]+)\)', source(c)):
            assert (ROOT/'nbs'/link.split('#')[0]).exists(), link


def test_links_of_the_readme_are_alive():
    for link in re.findall(r'\]\((?!\w+:|#)([^)\s]+)\)', (ROOT/'README.md').read_text()):
        assert (ROOT/link.split('#')[0]).exists(), link


@each(NUMBERED)
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


@each(NUMBERED)
def test_imports_point_down(path):
    "An exported import names only notebooks of a lower number; matching, reweight and loss import nothing of ours."
    number = {p.stem.split('_', 1)[1]: p.stem.split('_')[0] for p in NUMBERED}
    module = path.stem.split('_', 1)[1]
    found = {m for m, _ in imports('\n'.join(exported(path)))}
    assert all(number[m] < number[module] for m in found), found
    if module in ('matching', 'reweight', 'loss'): assert not found


@each(NOTEBOOKS)
def test_no_private_name_crosses_a_wall(path):
    "A name that begins with an underscore stays in its module."
    own = path.stem.split('_', 1)[1] if path in NUMBERED else ''
    assert not [name for module, name in imports(code_of(path)) if name.startswith('_') and module != own]


@each(METHOD)
def test_course(path):
    "Opens with what the reader can do at its end, and closes with exercises, their answers and links."
    opening = source(cells(path)[1])
    assert opening.startswith('*At the end you can*') and '*Before it*:' in opening
    prose = '\n'.join(source(c) for c in cells(path, 'markdown'))
    exercises = prose.split('## Exercises')[1].split('\n## ')[0]
    assert len(re.findall(r'^\d\. ', exercises, re.M)) == exercises.count('<details>') >= 3
    assert '## What would go wrong' in prose
    links = prose.split('## Where to go')[1]
    following = f'{int(path.name[:2]) + 1:02d}_'
    assert following in links and 'openaccess.thecvf.com' in links


@each(METHOD)
def test_minutes_are_counted(path):
    "200 words of prose and 20 lines of code a minute, to within a quarter."
    stated = int(re.search(r'About (\d+) minutes', source(cells(path)[1])).group(1))
    words = sum(len(source(c).split()) for c in cells(path, 'markdown'))
    lines = sum(len(source(c).splitlines()) for c in cells(path, 'code'))
    assert abs(stated - (words/200 + lines/20)) <= stated/4, words/200 + lines/20


@each(METHOD)
def test_pictures_are_wide(path):
    "At least 800 pixels, so that a reader sees what the text speaks of."
    for c in cells(path, 'code'):
        for o in c['outputs']:
            png = base64.b64decode(o.get('data', {}).get('image/png', ''))
            if png: assert int.from_bytes(png[16:20], 'big') >= 800, c['id']


def test_quickstart():
    "The loop has fifteen lines, and no cell has more."
    lengths = [len(source(c).splitlines()) for c in cells(ROOT/'nbs'/'quickstart.ipynb', 'code')]
    assert max(lengths) == 15


@each(PAPERMILL)
def test_papermill_parameters(path):
    "Exactly one tagged cell; every line is `name:type = value # why`."
    tagged, = parameters(path)
    for line in source(tagged).splitlines(): assert re.match(r'\w+:\w+ = .+?\s+# \S', line), line


@each(PAPERMILL)
def test_papermill_notebook_reads_as_a_report(path):
    "No cell over 12 lines besides the parameters and the imports; the names given are found by one function."
    for c in cells(path, 'code'):
        lines = [line for line in source(c).splitlines() if line.strip()]
        if c in parameters(path) or lines[0].startswith(('import ', 'from ')): continue
        assert len(lines) <= 12, f'{len(lines)} lines: {lines[0]}'
    assert 'given_parameters(before, globals())' in code_of(path)


def test_train_offers_every_parameter():
    "The parameters cell has the names, types and sentences of PretrainConfig, and how many processes to start."
    tagged, = parameters(ROOT/'nbs'/'train.ipynb')
    rows = re.findall(r'^(\w+):(\w+) = \S+\s+# (.*)$', source(tagged), re.M)
    wanted = [(f.name, f.type.__name__, f.metadata['why']) for f in fields(PretrainConfig)]
    assert rows[:-1] == wanted and rows[-1][:2] == ('processes', 'int')


def test_readme_names_real_parameters():
    "Every -p of the README is a parameter, every notebook it names exists, and the two commands stand in it."
    readme = (ROOT/'README.md').read_text()
    for notebook, rest in re.findall(r'papermill (nbs/\w+\.ipynb)(.*)', readme):
        code = '\n'.join(source(c) for c in parameters(ROOT/notebook))
        for p in re.findall(r'-p (\w+)', rest): assert re.search(rf'^{p}:', code, re.M), p
    for command in ('pip install -e . && papermill nbs/train.ipynb out.ipynb --log-output',
                    "pip install -e '.[dev]' && CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 nbdev_test && pytest"):
        assert command in readme.splitlines()


def test_readme_is_the_index(tmp_path):
    "README.md and its pictures are what .ci/readme makes of nbs/index.ipynb."
    subprocess.run([sys.executable, ROOT/'.ci'/'readme', tmp_path], check=True, capture_output=True, timeout=120)
    assert (tmp_path/'README.md').read_text() == (ROOT/'README.md').read_text()
    made = {p.name: p.read_bytes() for p in (tmp_path/'nbs'/'images').glob('README_*')}
    assert made and made == {p.name: p.read_bytes() for p in (ROOT/'nbs'/'images').glob('README_*')}


def test_settings_keep_the_parameters_tag():
    "Without this line nbdev_clean drops the tag, and papermill silently runs with the defaults."
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    assert settings['DEFAULT']['allowed_cell_metadata_keys'] == 'tags'
    assert settings['DEFAULT']['clear_all'] == 'False'
