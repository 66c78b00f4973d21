"""``python -m alignment`` is ``align``."""

from alignment.cli import main

main()
