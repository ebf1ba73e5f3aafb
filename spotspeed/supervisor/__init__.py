"""The process above a launcher: passes notices on, waits for durability, starts again."""
