"""Settings of all tests."""

import os
import signal

import torch
from hypothesis import settings

# A machine that is busy with something else is no fault of the code.
settings.register_profile("cheaptrain", deadline=None)
settings.load_profile("cheaptrain")

# In the background of a script a process ignores Ctrl-C from birth, and so does all it starts: the tests that send it
# would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests fork. A process that OpenMP has given threads to hangs in its first computation after that.
torch.set_num_threads(1)

# Without a GPU Triton's kernels run in its interpreter, and that is settled when triton is imported, by whatever test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
