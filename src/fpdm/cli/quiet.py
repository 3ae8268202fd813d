"""diffusers and accelerate say much that is meant for other programs; only errors of theirs reach the terminal."""

import logging


def quiet_libraries() -> None:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
