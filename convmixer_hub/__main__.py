"""`python -m convmixer_hub` is `convmixer`."""

from .cli.main import main

main()
