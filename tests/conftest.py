"""One thread, no GPU unless asked for, no data of the machine's owner, and a warning of our own code is an error."""
import os
import sys

os.environ['OMP_NUM_THREADS'] = '1'                                # before torch: equal bits need equal threads
if 'cuda' not in sys.argv: os.environ['CUDA_VISIBLE_DEVICES'] = ''   # pytest -m cuda: tests of the GPU itself
for name in ('IN_TEST', 'PIXCON_DATA'): os.environ.pop(name, None)

OURS = ['error:::pixcon', 'error:::tests', r'error:::test_\w+']
OF_OTHERS = [
    # torchvision says so at each call of a decoder or encoder; 01_data prefers torchcodec where it is there
    'ignore:The image decoding and encoding capabilities of TorchVision are deprecated',
    # pycocotools hands numpy 2 an array type without the `copy` keyword; nothing of ours is copied there
    'ignore:__array__ implementation doesn.t accept a copy keyword:DeprecationWarning:pycocotools',
]


def pytest_configure(config):
    config.addinivalue_line('markers', 'cuda: needs a GPU, run with `pytest -m cuda`')
    for line in [*OURS, *OF_OTHERS]: config.addinivalue_line('filterwarnings', line)
