"""Installs the package that the notebooks export; every fact lives in settings.ini."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      license='Apache-2.0', url=cfg['git_url'], packages=[cfg['lib_path']],
      package_data={cfg['lib_name']: ['trained/*', 'explore.js']},
      python_requires='>=' + cfg['min_python'],
      install_requires=cfg['requirements'].split(),
      extras_require={'dev': cfg['dev_requirements'].split(), 'explore': cfg['explore_requirements'].split()},
      long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown')
