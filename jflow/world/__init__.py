"""The built-in world: pictures, captions and questions drawn by program, and their judge."""
