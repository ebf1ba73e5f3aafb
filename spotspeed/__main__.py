"""`python -m spotspeed`: the command line."""

from spotspeed.cli import main

main()
