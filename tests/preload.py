"""What the fork server imports once for all ranks: everything that a training run would import in each process.

Besides Mythos these are modules that torch and DeepSpeed import only when the first optimizer or engine is made, which
takes five CPU seconds.
"""

import gc

import torch._dynamo
import torch._inductor.compile_fx
import torch.utils.tensorboard  # noqa: F401

import tests.train.runs  # noqa: F401

gc.collect()
gc.freeze()  # DeepSpeed calls gc.collect() often, and need not look at these modules again in every rank
