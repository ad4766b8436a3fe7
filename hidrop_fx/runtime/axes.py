"""Position ids on several axes, and the position rules that have no meaning for them."""

from hidrop_fx.errors import ScheduleError
from hidrop_fx.models import Family
from hidrop_fx.schedule.schedule import Schedule


def check_positions(family: Family, schedule: Schedule) -> None:
    """Check that a schedule's position rule is defined for a family's position ids.

    Raises:
        ScheduleError: the rule renumbers tokens whose ids are time, height and width.
    """
    rule = schedule.position_rule
    if family.axes > 1 and (rule.renumbers_text or rule.renumbers_after_prunes):
        raise ScheduleError(
            f"positions={schedule.positions!r} numbers tokens in a row, but this model's position ids have "
            f"{family.axes} axes (time, height, width); use positions='persistent'"
        )
