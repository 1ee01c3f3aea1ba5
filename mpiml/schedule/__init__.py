"""Pipeline schedules as data: listed, simulated and drawn without MPI, and executed by mpiml.parallel."""

from .draw import figure, picture, text
from .orders import SCHEDULES, B, F, W, gpipe, interleaved, one_f_one_b, sequential, zb_h1, zb_v
from .simulate import ScheduleError, Span, Timeline, alive, check, costs, orders, owners, replay, simulate

__all__ = ["SCHEDULES", "B", "F", "ScheduleError", "Span", "Timeline", "W", "alive", "check", "costs", "figure",
           "gpipe", "interleaved", "one_f_one_b", "orders", "owners", "picture", "replay", "sequential", "simulate", "text",
           "zb_h1", "zb_v"]
