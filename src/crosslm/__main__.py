"""``python -m crosslm``, the same as the command ``crosslm``."""

from crosslm.cli.main import main

main()
