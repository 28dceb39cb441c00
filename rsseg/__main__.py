"""`python -m rsseg`, for launchers such as torchrun."""

from rsseg.cli import main

main()
