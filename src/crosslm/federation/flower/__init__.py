"""Flower as the carrier of uploads and downloads between machines.

Flower reports to its maker and looks for updates unless it is told not to before it is imported, so it
is told here, where every import of it in this package passes.
"""

import os

from crosslm.federation.kits import QUIET

os.environ.update(QUIET)
