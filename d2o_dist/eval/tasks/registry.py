"""From configured tasks to tasks that make rows."""

from __future__ import annotations

from collections.abc import Iterable

from d2o_dist.config.eval_tasks import JsonlTask, LongBenchTask, NeedleTask, PassageTask, RulerTask, TaskConfig
from d2o_dist.eval.examples import Task
from d2o_dist.eval.tasks.jsonl import Jsonl
from d2o_dist.eval.tasks.longbench import LongBench
from d2o_dist.eval.tasks.needle import Needle
from d2o_dist.eval.tasks.passages import Passages
from d2o_dist.eval.tasks.ruler import Ruler


def make_tasks(configs: Iterable[TaskConfig]) -> list[Task]:
    """The tasks in order; a suite (`ruler`, `longbench`) becomes one task for each of its own, named `suite/task`."""
    tasks: list[Task] = []
    for config in configs:
        if isinstance(config, NeedleTask):
            tasks.append(Needle(config))
        elif isinstance(config, PassageTask):
            tasks.append(Passages(config))
        elif isinstance(config, JsonlTask):
            tasks.append(Jsonl(config))
        elif isinstance(config, RulerTask):
            tasks += [Ruler(config, name) for name in config.tasks]
        else:
            assert isinstance(config, LongBenchTask), config
            tasks += [LongBench(config, name) for name in config.tasks]
    return tasks
