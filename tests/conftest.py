"""One thread per process: the networks here are tiny, and on a busy machine threads wait for each other."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
torch.set_num_threads(1)
