"""The site that .ci/site makes: pages, links, search, formulas, live outputs, with and without a browser."""
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

pytest.importorskip('latex2mathml', reason="formulas of the site need latex2mathml, which comes with '.[dev]'")
ROOT = Path(__file__).parent.parent
PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
ALIVE = '<div id="it">dead</div><script type="module">document.querySelector("#it").textContent = "alive"</script>'


def save(path, *cells): path.write_text(writes(new_notebook(cells=list(cells))))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A site of two small notebooks in a folder like the project's, and what .ci/site says of it."
    root = tmp_path_factory.mktemp('project')
    (root/'nbs').mkdir()
    (root/'LICENSE').write_text('as you like')
    text = '# small\n\n> A project.\n\n| | notebook |\n|---|---|\n| part | [00_live](00_live.ipynb#what-is-alive) |\n'
    save(root/'nbs'/'index.ipynb', new_markdown_cell(text + '\n[licence](../LICENSE), [gone](gone.ipynb)'))
    output = new_output('display_data', {'text/html': ALIVE, 'image/png': PIXEL, 'text/plain': 'text'})
    save(root/'nbs'/'00_live.ipynb',
         new_markdown_cell('# live\n\n> One output.\n\n## What is alive\n\nSee $a_i^2$.\n\n$$\\sum_i x_i$$'),
         new_code_cell('#| default_exp live'),
         new_code_cell('#| export\ndef wonder(): ...', outputs=[output]),
         new_code_cell('x', outputs=[new_output('display_data', {'image/png': PIXEL})]),
         new_code_cell('1/0', outputs=[new_output('error', ename='ZeroDivisionError', evalue='', traceback=['oh'])]))
    module = ModuleType('site_script')
    module.__file__ = str(ROOT/'.ci'/'site')
    SourceFileLoader('site_script', module.__file__).exec_module(module)
    templates = module.TEMPLATES
    module.ROOT, module.NBS = root, root/'nbs'
    site = module.Site(root/'out', templates)
    site.build()
    return root/'out', site


def test_pages_of_a_small_project(made):
    out, site = made
    assert site.parts == {'': ['index'], 'part': ['00_live']}
    page = (out/'00_live.html').read_text()
    assert ALIVE in page and 'default_exp' not in page
    assert page.count('<math') == 2 and '$' not in page.split('<main')[1]
    assert 'id="what-is-alive"' in page and 'pixcon.live' in page
    assert (out/'pictures'/'00_live-0.png').exists() and page.count('<img') == 1
    assert '00_live.html#what-is-alive' in (out/'index.html').read_text()
    assert (out/'repository'/'LICENSE').read_text() == 'as you like'
    assert 'wonder' in (out/'search.js').read_text()


def test_what_is_wrong_is_named(made):
    assert made[1].problems == ['index: gone.ipynb is not there', '00_live: an output is an error']


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Some pages of the project, or a whole site that $PIXCON_SITE names."
    if os.environ.get('PIXCON_SITE'): return Path(os.environ['PIXCON_SITE']).resolve()
    out = tmp_path_factory.mktemp('site')
    command = [sys.executable, ROOT/'.ci'/'site', out, 'index', '06_reweight', '07_loss']
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_build(built):
    "The README and notebooks of the project: nothing from the network, no TeX left, no link to a notebook's source."
    for page in built.rglob('*.html'):
        text = page.read_text()
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http', 'cdn'): assert tag not in text
        assert '.ipynb"' not in text
    assert (built/'07_loss.html').read_text().count('<math') > 10


def browser(playwright):
    "Chromium of the system or of playwright; a test without either is skipped."
    found = shutil.which('chromium') or shutil.which('google-chrome')
    try: return playwright.chromium.launch(executable_path=found, args=['--no-sandbox'])
    except Exception as error: pytest.skip(f'no Chromium to look at the site with: {str(error).splitlines()[0]}')


@pytest.fixture(scope='module')
def look():
    "A function that opens a page and returns it with what went wrong in it."
    api = pytest.importorskip('playwright.sync_api', reason='looking at the site in a browser needs playwright')
    with api.sync_playwright() as playwright:
        chromium = browser(playwright)
        def open_page(path, width=1280, **more):
            page, wrong = chromium.new_page(viewport=dict(width=width, height=900), **more), []
            page.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
            page.on('pageerror', lambda e: wrong.append(str(e)))
            page.on('requestfailed', lambda r: wrong.append(f'failed: {r.url}'))
            page.on('request', lambda r: wrong.append(f'network: {r.url}') if r.url.startswith('http') else None)
            page.goto(path.as_uri())
            return page, wrong
        yield open_page
        chromium.close()


def test_output_is_alive(made, look):
    page, wrong = look(made[0]/'00_live.html')
    assert page.text_content('#it') == 'alive' and not wrong


def test_pages_in_a_browser(built, look):
    "No console error, no missing image, nothing from the network, and no page wider than a phone."
    for path in sorted(built.rglob('*.html')):
        for width, scheme in ((1280, 'light'), (390, 'dark')):
            page, wrong = look(path, width, color_scheme=scheme)
            page.evaluate("for (const i of document.images) i.loading = 'eager'")
            page.wait_for_function('[...document.images].every(i => i.complete)')
            missing = page.evaluate('[...document.images].filter(i => !i.naturalWidth).map(i => i.src)')
            assert not wrong and not missing, f'{path.name}: {wrong} {missing}'
            assert page.evaluate('document.documentElement.scrollWidth') <= width, f'{path.name} is too wide'
            page.close()


def test_search_and_menu(built, look):
    "The keyboard finds a section and goes there; on a phone the menu opens and closes."
    page, wrong = look(built/'index.html', 390)
    page.keyboard.press('/')
    page.keyboard.type('info_nce queue')
    page.wait_for_selector('#found .chosen a')
    page.keyboard.press('Enter')
    page.wait_for_url('**/*.html#*')
    assert page.evaluate("!!document.getElementById(decodeURIComponent(location.hash.slice(1)))")
    inside = "document.querySelector('#sidebar').getBoundingClientRect().right > 0"
    assert not page.evaluate(inside)
    page.click('#menu')
    page.wait_for_function(inside)
    page.click('main', position=dict(x=380, y=300))
    page.wait_for_function(f'!({inside})')
    assert not wrong
