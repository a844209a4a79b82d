"""--deterministic: the same flags on the same machine give the same bits on a GPU, too."""

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def make_deterministic() -> list[str]:
    """Before CUDA starts: torch's deterministic algorithms alone; an operation that has none raises RuntimeError.

    Flash and memory-efficient attention then add in a fixed order in their backward passes; cuDNN's may not, and is
    switched off, as is every choice by timing. Returns notes.
    """
    given = os.environ.setdefault(WORKSPACE, ":4096:8")
    if given not in (":4096:8", ":16:8"):
        raise ValueError(
            f"--deterministic: {WORKSPACE}={given} in the environment; expected :4096:8 or :16:8"
        )
    os.environ.setdefault("TORCHINDUCTOR_MAX_AUTOTUNE", "0")
    torch.use_deterministic_algorithms(True)
    # nothing reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    return ["--deterministic: slower on a GPU, by 11 % where it was measured (docs/running.md)"]
