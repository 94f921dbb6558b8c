"""`python COPY/launcher/in_snapshot.py -u -m MODULE WORDS…`: run MODULE with the code of COPY.

Python alone would look into the folder that one stands in first, which is usually the checkout that was copied.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    _, _, _, module, *words = sys.argv
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
