"""Growing models: `ligo` is the operator, `families` and `starts` say what it is made of; `recipe` is the command's way
from one checkpoint on disk to another, `schedule` a training loop's from one size to the next."""

from growkit.growth.ligo import LiGO
from growkit.growth.schedule import Schedule
from growkit.growth.shards import ShardedFiles

__all__ = ["LiGO", "Schedule", "ShardedFiles"]
