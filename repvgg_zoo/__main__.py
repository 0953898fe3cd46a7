"""Run the command line by `python -m repvgg_zoo`."""

import sys

from repvgg_zoo_cli import main

if __name__ == '__main__':
    sys.exit(main())
