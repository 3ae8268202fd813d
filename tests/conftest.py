"""One thread per process: the networks here are tiny, and on a busy machine threads wait for each other."""

import os
import signal

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
torch.set_num_threads(1)
# A shell's background jobs ignore interrupts, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
