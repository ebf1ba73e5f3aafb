"""Agreement across ranks: transports, signals, notices and the control thread."""
