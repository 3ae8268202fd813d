"""One thread per process: the networks here are tiny, and on a busy machine threads wait for each other."""

import os
import signal

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
torch.set_num_threads(1)
# A shell's background jobs ignore interrupts, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """label -> folder of a saved model, "looped" and "plain"."""
    from tests.experiments.sweeps import save_models  # which imports diffusers: not for tests that do without

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The folder in which statistics are kept meanwhile: not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FPDM_CACHE", str(folder))
        yield folder
