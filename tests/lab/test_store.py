"""The tests of tracking, of sweeps and of resumed runs, against a server with PostgreSQL: the fixtures differ."""

import pytest

from tests.faults.test_tracker import (
    test_a_killed_run_is_marked_and_its_next_start_goes_on_without_repeating_a_step as test_a_killed_run_goes_on,
)
from tests.unit.test_headline import (
    test_a_trainings_run_gets_what_evaluations_find_and_the_last_one_counts as test_evaluations_of_a_training,
)
from tests.unit.test_headline import tracked_in as tracked_in
from tests.unit.test_sweep import shards as shards
from tests.unit.test_sweep import (
    test_a_sweep_is_ranked_in_its_folder_and_in_mlflow as test_a_sweep,
)
from tests.unit.test_sweep import (
    test_the_runs_are_children_of_one_mlflow_run as test_the_runs_of_a_sweep,
)
from tests.unit.test_tracking import (
    test_a_run_is_linked_to_another_one_that_gets_its_id_later as test_stage_2_is_linked,
)
from tests.unit.test_tracking import (
    test_a_run_that_was_made_but_not_noted_down_is_found as test_a_run_that_was_not_noted_down,
)
from tests.unit.test_tracking import (
    test_a_run_without_tracking_can_be_synced as test_a_run_without_tracking,
)
from tests.unit.test_tracking import (
    test_all_of_a_run_is_in_mlflow_and_a_resume_continues_it as test_all_of_a_run,
)
from tests.unit.test_tracking import (
    test_the_status_tells_how_a_run_ended as test_the_status,
)

pytestmark = pytest.mark.lab
__all__ = [
    "test_a_killed_run_goes_on",
    "test_a_run_that_was_not_noted_down",
    "test_a_run_without_tracking",
    "test_a_sweep",
    "test_all_of_a_run",
    "test_evaluations_of_a_training",
    "test_stage_2_is_linked",
    "test_the_runs_of_a_sweep",
    "test_the_status",
]


@pytest.fixture(autouse=True)
def at_the_server(uri: str) -> None:
    """Where all of them are tracked."""
