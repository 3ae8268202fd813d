"""`python -m fpdm`, and `accelerate launch -m fpdm`."""

import sys

from fpdm.cli import main

if __name__ == "__main__":
    sys.exit(main())
