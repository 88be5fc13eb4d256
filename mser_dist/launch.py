"""Jobs from Python, under the name that users import; the code is in `jobs/launch.py`."""

from mser_dist.jobs.launch import Resources, submit

__all__ = ["Resources", "submit"]
