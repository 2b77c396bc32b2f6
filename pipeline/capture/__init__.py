"""Stage one: run the teacher over packed rows and write the caches.

run(recipe)         fill both caches, or one task's share of their shards; continues where it stopped
finalise(recipe)    check the caches that several tasks wrote, and hand over what later stages need
"""

from .stage_one import finalise, run

__all__ = ["finalise", "run"]
