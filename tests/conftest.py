"""Before any test imports Triton: without a GPU its kernels run in Triton's interpreter, on NumPy."""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
