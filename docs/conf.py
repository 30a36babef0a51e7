"""The documentation site: the pages of this folder, and three that are written from the code."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from reference import commands_page, configuration_page, kits_page

import crosslm

project = "crosslm"
copyright = "the crosslm contributors"
release = version = crosslm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"crosslm {release}"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["opacus", "flwr"]  # of extras
napoleon_use_rtype = False

pages = {"configuration": configuration_page(), "kits": kits_page(), "commands": commands_page()}
for name, text in pages.items():
    page = Path(__file__).parent / "reference" / f"{name}.md"
    page.parent.mkdir(exist_ok=True)
    if not page.exists() or page.read_text() != text:  # Sphinx builds again only what is newer
        page.write_text(text)
