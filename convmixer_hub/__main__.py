"""`python -m convmixer_hub` is `convmixer`."""

from .cli import main

main()
