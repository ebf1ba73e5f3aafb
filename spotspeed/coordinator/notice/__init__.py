"""Where interruption notices come from: one module a source."""
