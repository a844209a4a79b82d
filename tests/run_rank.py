"""One process of `spawn` in conftest.py: python run_rank.py TEST_FILE FUNCTION FOLDER."""

import importlib.util
import os
import pickle
import sys
from pathlib import Path

import torch


def main(test_file: str, function: str, folder: str) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("spawned_test", test_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spawned_test"] = module
    spec.loader.exec_module(module)
    arguments = pickle.loads(Path(folder, "arguments.pickle").read_bytes())
    result = getattr(module, function)(*arguments)
    Path(folder, f"result_{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that leaves while another still sends makes gloo abort that one
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
