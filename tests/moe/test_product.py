"""Every combination of router, balance, capacity, structure and backend agrees with `dense.py`, or says why not.

The product of the lists below, at T = 16 and d = 16, in training and evaluation: output, losses, counts, and the
gradients of every weight and of the input, to 1e-5 in fp32; then a sample of all flags at once. What is refused is
held against a table of rules written here.
"""

import itertools
import random
import time
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE, Tokens
from open_lm.moe.stats import router_loss

from . import dense as definition
