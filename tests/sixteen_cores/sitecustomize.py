"""Put this folder on PYTHONPATH and Python believes that the machine has 16 cores."""
import os

os.cpu_count = lambda: 16
if hasattr(os, 'sched_getaffinity'): os.sched_getaffinity = lambda pid: set(range(16))
