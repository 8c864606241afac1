"""Installs the package that the notebooks export; every fact lives in settings.ini."""
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

extras = {name: cfg[f'{name}_requirements'].split() for name in ('dev', 'onnx', 'hub', 'track', 'explore', 'frameworks')}
extras['dev'] += extras['onnx'] + extras['hub'] + extras['track']

readme = Path('README.md').read_text(encoding='utf-8')             # an index shows it alone: links to the repository
readme = re.sub(r'(!\[[^\]]*\]\()(?!\w+:)', rf"\g<1>{cfg['git_url']}/raw/{cfg['branch']}/", readme)
readme = re.sub(r'(\]\()(?!\w+:|#)', rf"\g<1>{cfg['git_url']}/blob/{cfg['branch']}/", readme)

stages = {'2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
classifiers = [
    f"Development Status :: {stages[cfg['status']]}",
    'Framework :: Jupyter',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Topic :: Scientific/Engineering :: Image Recognition']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      license='Apache-2.0', license_files=['LICENSE'], keywords=cfg['keywords'].split(), classifiers=classifiers,
      url=cfg['git_url'], project_urls={'Source': cfg['git_url'], 'Paper': cfg['paper_url']},
      packages=[cfg['lib_path']], package_data={cfg['lib_name']: ['trained/*', 'explore.js']},
      python_requires='>=' + cfg['min_python'],
      install_requires=cfg['requirements'].split(), extras_require=extras,
      long_description=readme, long_description_content_type='text/markdown')
