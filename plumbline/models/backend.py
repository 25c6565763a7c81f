"""How torch computes in every process of ours that computes with it."""

import torch


def set_up_torch(threads: int, *, deterministic: bool = False) -> None:
    """Set the number of threads, and turn off cuDNN's attention, which PyTorch would prefer on Hopper and later.

    It builds a plan of 50 to 500 ms for each new length of a sequence, and ours differ in every batch.

    Args:
        deterministic: refuse what sums in no fixed order, where there is no form of it that does not.
    """
    torch.set_num_threads(threads)
    if deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
