"""`python -m h3lm`."""

from h3lm.cli import main

main()
