"""The slots of a cache: what one holds, and where they lie."""
