"""What runs in the next step; pure Python and numpy."""

from core.scheduler.limits import Limits
from core.scheduler.plan import Checkpoint, PrefillRow, PromptRow, StepPlan
from core.scheduler.records import Event, SchedulerConfig
from core.scheduler.scheduler import Scheduler
from core.scheduler.sequence import Request, Sequence, SlotTable, Status

__all__ = [
    "Checkpoint",
    "Event",
    "Limits",
    "PrefillRow",
    "PromptRow",
    "Request",
    "Scheduler",
    "SchedulerConfig",
    "Sequence",
    "SlotTable",
    "Status",
    "StepPlan",
]
