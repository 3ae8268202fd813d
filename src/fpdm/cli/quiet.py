"""diffusers and accelerate say much that is meant for other programs. Their errors are raised, too, and told once."""

import logging


def quiet_libraries() -> None:
    import diffusers

    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
