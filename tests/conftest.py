"""What all tests share."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts what it puts into the background deaf to Ctrl-C, and all
    # that this starts as well; tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
