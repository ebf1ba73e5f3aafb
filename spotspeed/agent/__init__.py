"""The saver process of a node: owns the staging memory, writes and seals, outlives the ranks."""
