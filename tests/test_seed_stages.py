"""The programs of the page "Checkpoint Manager", run on taskckpt.

They are changed in their import (``checkpoint_manager`` is ``taskckpt``), and where a note beside them says so. What
the page leaves undefined (its work, and the manager that an earlier block made) stands before them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from taskckpt.stages import CheckpointManager

CORE_CLASS = '''
import os
import logging


class CheckpointManager:
    """
    Manages checkpoints during pipeline execution.
    Each stage saves its completion status, so the pipeline can resume intelligently.
    """

    def __init__(self, checkpoint_dir="checkpoints"):
        self.checkpoint_dir = checkpoint_dir
        os.makedirs(self.checkpoint_dir, exist_ok=True)

    def save_checkpoint(self, stage_name):
        """
        Marks a pipeline stage as completed.
        :param stage_name: Name of the completed pipeline stage
        """
        try:
            checkpoint_file = os.path.join(self.checkpoint_dir, f"{stage_name}.checkpoint")
            with open(checkpoint_file, "w") as f:
                f.write("COMPLETED")
            logging.info(f"Checkpoint saved: {stage_name}")
        except Exception as e:
            logging.error(f"Error saving checkpoint: {e}")

    def has_checkpoint(self, stage_name):
        """
        Checks if a stage checkpoint exists.
        :param stage_name: Name of the pipeline stage
        :return: True if the checkpoint exists, False otherwise
        """
        checkpoint_file = os.path.join(self.checkpoint_dir, f"{stage_name}.checkpoint")
        return os.path.exists(checkpoint_file)

    def clear_checkpoints(self):
        """
        Clears all checkpoints.
        """
        for checkpoint_file in os.listdir(self.checkpoint_dir):
            os.remove(os.path.join(self.checkpoint_dir, checkpoint_file))
        logging.info("All checkpoints cleared.")
'''

WORK = """
import sys

def fetch_data_from_source():
    print("fetch")
    return [3, 1, 2]

def preprocess_data(raw_data):
    print("preprocess")
    if "fails" in sys.argv:
        raise RuntimeError("out of memory")
    return sorted(raw_data)

def train_model(processed_data):
    print("train")
    return sum(processed_data)
"""

BASIC_INTEGRATION = """
from taskckpt import CheckpointManager

# Initialize the checkpoint manager
checkpoint_manager = CheckpointManager()

if not checkpoint_manager.has_checkpoint("data_ingestion"):
    raw_data = fetch_data_from_source()
    checkpoint_manager.save_checkpoint("data_ingestion")

if not checkpoint_manager.has_checkpoint("data_preprocessing"):
    processed_data = preprocess_data(raw_data)
    checkpoint_manager.save_checkpoint("data_preprocessing")

if not checkpoint_manager.has_checkpoint("model_training"):
    model = train_model(processed_data)
    checkpoint_manager.save_checkpoint("model_training")

# Pipeline intelligently resumes or completes only missing stages
"""

# NOTE: ours. The page's program knows that a stage is done, but not what it gave: it cannot go on from there.
WITH_RESULTS = """
from taskckpt import CheckpointManager

checkpoint_manager = CheckpointManager()
raw_data = checkpoint_manager.run("data_ingestion", fetch_data_from_source)
processed_data = checkpoint_manager.run("data_preprocessing", preprocess_data, raw_data)
model = checkpoint_manager.run("model_training", train_model, processed_data)
print(model)
"""

LOGGING = """
import logging
import sys

logging.basicConfig(level=logging.INFO, format="%(levelname)s - %(message)s", stream=sys.stdout)
"""

CLEARING = """
from taskckpt import CheckpointManager

checkpoint_manager = CheckpointManager()
checkpoint_manager.clear_checkpoints()
"""

# NOTE: the page's folder is "/path/to/custom/checkpoints"; a test writes to its own.
CUSTOM_DIRECTORY = """
from taskckpt import CheckpointManager

custom_checkpoint_dir = "path/to/custom/checkpoints"
checkpoint_manager = CheckpointManager(checkpoint_dir=custom_checkpoint_dir)

# Save and manage checkpoints in the custom directory
checkpoint_manager.save_checkpoint("stage_1")
"""

MANAGER = """
from taskckpt import CheckpointManager

checkpoint_manager = CheckpointManager()
"""

ERROR_HANDLING = """
try:
    checkpoint_manager.save_checkpoint("example_stage")
except Exception as e:
    print(f"Failed to save checkpoint: {e}")
"""

MULTIPLE_PIPELINES = """
pipeline_1_manager = CheckpointManager("checkpoints/pipeline_1")
pipeline_2_manager = CheckpointManager("checkpoints/pipeline_2")

# Each pipeline operates independently
if not pipeline_1_manager.has_checkpoint("stage_a"):
    pipeline_1_manager.save_checkpoint("stage_a")
if not pipeline_2_manager.has_checkpoint("stage_b"):
    pipeline_2_manager.save_checkpoint("stage_b")
"""

METADATA = """
import os
from datetime import datetime

from taskckpt import CheckpointManager

class StampedCheckpointManager(CheckpointManager):
    def save_checkpoint(self, stage_name):
        checkpoint_file = os.path.join(self.checkpoint_dir, f"{stage_name}.checkpoint")
        with open(checkpoint_file, "w") as f:
            f.write(f"COMPLETED\\nTimestamp: {datetime.now()}")

StampedCheckpointManager().save_checkpoint("stamped stage")
"""


def start(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    Path("program.py").write_text(program)
    command = [sys.executable, "program.py", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=18, check=False)


def run(program: str, *args: str) -> list[str]:
    done = start(program, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_basic_integration():
    assert run(WORK + BASIC_INTEGRATION) == ["fetch", "preprocess", "train"]
    assert run(WORK + BASIC_INTEGRATION) == []
    CheckpointManager().clear_checkpoints("model_training")
    again = start(WORK + BASIC_INTEGRATION)
    assert "NameError: name 'processed_data' is not defined" in again.stderr


def test_basic_integration_with_results_goes_on_where_it_failed():
    failed = start(WORK + WITH_RESULTS, "fails")
    assert failed.stdout.split() == ["fetch", "preprocess"]
    assert "RuntimeError: out of memory" in failed.stderr
    assert run(WORK + WITH_RESULTS) == ["preprocess", "train", "6"]
    assert run(WORK + WITH_RESULTS) == ["6"]


def test_clearing_all_checkpoints():
    run(WORK + BASIC_INTEGRATION)
    assert run(LOGGING + CLEARING)[-1] == "INFO - All checkpoints cleared."
    assert run(WORK + BASIC_INTEGRATION) == ["fetch", "preprocess", "train"]


def test_the_log_of_saving():
    assert "INFO - Checkpoint saved: data_ingestion" in run(LOGGING + WORK + BASIC_INTEGRATION)


def test_a_custom_directory():
    run(CUSTOM_DIRECTORY)
    assert CheckpointManager("path/to/custom/checkpoints").has_checkpoint("stage_1")
    assert not Path("checkpoints").exists()


def test_error_handling():
    assert run(MANAGER + ERROR_HANDLING) == []
    assert CheckpointManager().has_checkpoint("example_stage")
    # NOTE: ours. The class of the page catches and logs its errors, so that its own caller never sees one.
    breaks = "\nimport os\nos.rmdir('checkpoints')\nopen('checkpoints', 'w').close()\n"
    os.rename("checkpoints", "elsewhere")
    (line,) = run(MANAGER + breaks + ERROR_HANDLING)
    assert line.startswith("Failed to save checkpoint: A part of the path is a file")


def test_multiple_pipelines():
    for _ in range(2):
        run(MANAGER + MULTIPLE_PIPELINES)
        for name, stage in (("pipeline_1", "stage_a"), ("pipeline_2", "stage_b")):
            assert [status.name for status in CheckpointManager(f"checkpoints/{name}").status()] == [stage]
    CheckpointManager().clear_checkpoints()  # the one around them
    assert CheckpointManager("checkpoints/pipeline_1").has_checkpoint("stage_a")


def test_metadata_in_a_marker_of_ones_own():
    run(METADATA)
    (status,) = CheckpointManager().status()
    assert (status.name, status.state) == ("stamped stage", "done")
    assert status.time is not None


def test_what_the_core_class_of_the_page_saved_counts_and_can_be_cleared():
    core = CORE_CLASS + BASIC_INTEGRATION.replace("from taskckpt import CheckpointManager", "")
    assert run(WORK + core) == ["fetch", "preprocess", "train"]
    assert run(WORK + BASIC_INTEGRATION) == []
    run(CLEARING)
    assert os.listdir("checkpoints") == []
    assert run(WORK + core) == ["fetch", "preprocess", "train"]
