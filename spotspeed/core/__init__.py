"""Everything that can be decided without I/O, clock, threads or torch."""
