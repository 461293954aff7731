"""The command `qpass`."""

from qpass.cli import look, make, measure, write  # noqa: F401  they add their commands
from qpass.cli.base import app as app
from qpass.cli.base import main as main
