"""The section `distributed`: how long the processes of a job wait for each other, and for a step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from jaxtrain.config.sections import Section


class DistributedSection(Section):
    """Times in seconds. All but `step_timeout` are for jobs of several processes."""

    initialization_timeout: PositiveInt = 300
    """Until all processes have started."""
    unreachable_timeout: Annotated[int, Field(ge=2)] = 10
    """Until a host that no longer answers, for example without power, is given up; the end of a process is seen at
    once."""
    heartbeat_timeout: PositiveInt = 600
    """Of JAX's own heartbeats: until a process without a heartbeat is given up."""
    shutdown_timeout: PositiveInt = 3600
    """That a process which is done waits for the others."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Of process 0, to which the others connect; 0: any free one."""
    step_timeout: PositiveInt | None = None
    """Until a run that waits for a step or its data is ended; default: 10 times the usual wait, and at least 300."""
