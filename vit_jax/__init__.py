"""Vision Transformers in JAX and Flax: pretrain, fine-tune, evaluate and predict."""

import sys

__version__ = "0.1.0"


def end_on_ctrl_c() -> None:
    """Makes Ctrl-C end this process without a traceback, until `cli.run` handles it."""
    import os
    import signal

    def end(number: int, frame: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


if sys.argv[:1] == ["-m"]:  # a command, `python -m vit_jax...`, whose imports take seconds
    end_on_ctrl_c()
