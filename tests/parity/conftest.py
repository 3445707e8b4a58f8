"""Makes timm importable where torchvision's compiled operators are not."""

import importlib.util

if importlib.util.find_spec("torch"):  # else the tests here skip themselves
    import torch

    from benchmarks.torch_contestants import make_torchvision_importable

    make_torchvision_importable()
    torch.set_num_threads(2)
