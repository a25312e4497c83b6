"""`launch/slurm/infer.sbatch` with programs in place of Slurm's: when it queues the job again."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.launch.test_infer import REPO

# srun runs one task; `python` ends as told, and says what it was given.
FAKES = {
    "srun": '#!/bin/bash\nshift\nexec "$@"\n',
    "scontrol": '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n',
    "python": '#!/bin/bash\nprintf "%s|" "$@" >> "$LOG"; echo >> "$LOG"\nexit "$STATUS"\n',
    "sleep": "#!/bin/bash\n",
}


@pytest.mark.parametrize("status", [0, 1, 75, 137])
def test_a_job_that_was_stopped_is_queued_again(tmp_path, status):
    for name, text in {**FAKES, "activate": ""}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VENV": str(tmp_path), "SLURM_JOB_ID": "7",
           "LOG": str(tmp_path / "log"), "STATUS": str(status)}  # fmt: skip
    command = ["bash", str(REPO / "launch" / "slurm" / "infer.sbatch"), "--prompts", "two words.jsonl"]
    assert subprocess.run(command, env=env, timeout=60).returncode == status
    called, *more = (tmp_path / "log").read_text().splitlines()
    assert called == "launch/infer.py|--prompts|two words.jsonl|"
    assert more == (["scontrol requeue 7"] if status == 75 else [])
