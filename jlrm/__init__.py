"""jlrm: train and use reasoning judges in JAX, on one CPU, one TPU chip or many slices."""

import signal as _signal
import sys as _sys
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from jlrm.serving.judge import Judge

__all__ = ["Judge"]
__version__ = "0.1.0"

# Python sets "-m" while it looks for the module of `python -m jlrm.train`, whose first imports
# would otherwise end in a traceback. Packages are looked up, not imported: that takes no time.
if _sys.argv[:1] == ["-m"]:
    _missing = [name for name in ("jax", "flax", "transformers", "yaml") if not _find_spec(name)]
    if _missing:
        print(
            f"error: jlrm's packages are not installed in this Python ({_missing[0]} is missing): "
            "source .venv/bin/activate, or pip install -e .",
            file=_sys.stderr,
        )
        _sys.exit(2)
    # Ctrl-C ends a command that is still importing: the exception of Python would be a traceback,
    # or be swallowed by a callback of JAX. `commands` takes over.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def __getattr__(name: str) -> _Any:
    """Import `Judge` when it is asked for, so that `import jlrm` takes no time."""
    if name != "Judge":
        raise AttributeError(f"module 'jlrm' has no attribute '{name}'")
    from jlrm.serving.judge import Judge

    return Judge
