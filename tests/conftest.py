"""Settings of all tests."""

import signal

from hypothesis import settings

# A machine that is busy with something else is no fault of the code.
settings.register_profile("cheaptrain", deadline=None)
settings.load_profile("cheaptrain")

# In the background of a script a process ignores Ctrl-C from birth, and so does all it starts: the tests that send it
# would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
