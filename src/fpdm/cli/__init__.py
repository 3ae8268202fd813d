"""The command line: `fpdm train`, `fpdm sample`, `fpdm demo`. Each command imports what it needs when it runs."""

from fpdm.cli.main import main

__all__ = ["main"]
