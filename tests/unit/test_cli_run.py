"""``taskckpt run``: any command is retried, knows who it is, and gets the signals; ``save`` and ``load`` within."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from taskckpt import Checkpoint, checkpoint
from taskckpt.cli import main

ROOT = Path(__file__).parent.parent.parent
TASKCKPT = [sys.executable, "-m", "taskckpt"]
RUN = [*TASKCKPT, "run", "--wait", "0"]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "TC": shlex.join(TASKCKPT), **more}


def run(*words, env=None, **options):
    """A run that ends by itself."""
    options = {"capture_output": True, "text": True, "timeout": 15, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run([*RUN, *map(str, words)], env=environment(**(env or {})), check=False, **options)


@pytest.fixture
def begun():
    """Begins runs, which are gone after the test."""
    all_of_them: list[subprocess.Popen[str]] = []

    def begin(*words, before=(), **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        one = subprocess.Popen([*before, *RUN, *map(str, words)], env=environment(), **options)
        all_of_them.append(one)
        return one

    yield begin
    for one in all_of_them:
        one.kill()
        one.communicate()


def script(name, text):
    Path(name).write_text(textwrap.dedent(text))
    return Path(name).absolute()


def wait_for(path, seconds=10.0):
    until = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.01)
    return Path(path)


def attempts(text):
    return text.count(" begins")


# --- attempts and exit codes -------------------------------------------------------------------


def test_it_ends_with_the_exit_code_of_the_command_and_tells_each_attempt():
    done = run("--key", "a", "--retries", "2", "--", "sh", "-c", "echo $TASKCKPT_ATTEMPT; exit 7")
    assert done.returncode == 7
    assert done.stdout == "0\n1\n2\n"
    told = [f"attempt {one} of 3 {what}" for one in (1, 2, 3) for what in ("begins", "ended with exit code 7")]
    assert [line.removeprefix("taskckpt: a: ") for line in done.stderr.splitlines()] == told


def test_what_succeeds_is_not_tried_again():
    done = run("--key", "a", "--", "sh", "-c", 'test "$TASKCKPT_ATTEMPT" = 1')
    assert done.returncode == 0
    assert attempts(done.stderr) == 2
    assert run("--key", "a", "--quiet", "true").stderr == ""
    assert run("--key", "a", "--retries", "0", "false").returncode == 1


def test_between_attempts_it_waits_longer_each_time():
    done = run("--key", "a", "--retries", "2", "--wait", "0.1", "false")
    waits = [float(line.split(" in ")[1].split()[0]) for line in done.stderr.splitlines() if " follows in " in line]
    assert 0.1 <= waits[0] <= 0.2
    assert 0.2 <= waits[1] <= 0.3


def test_a_code_that_no_retry_would_change():
    done = run("--key", "a", "--no-retry-on", "5", "--no-retry-on", "6", "--", "sh", "-c", "exit 6")
    assert (done.returncode, attempts(done.stderr)) == (6, 1)


def test_a_kill_from_outside_is_retried_and_ends_as_shells_end():
    done = run("--key", "a", "--retries", "1", "--", "sh", "-c", "kill -KILL $$")
    assert (done.returncode, attempts(done.stderr)) == (128 + signal.SIGKILL, 2)
    assert "was killed by SIGKILL" in done.stderr
    done = run("--key", "a", "--retries", "1", "--", "sh", "-c", "kill -TERM $$")
    assert (done.returncode, attempts(done.stderr)) == (128 + signal.SIGTERM, 2)


def test_what_cannot_be_run_is_not_tried_again():
    done = run("--key", "a", "--", "there-is-no-such-command")
    assert (done.returncode, attempts(done.stderr)) == (127, 1)
    assert "there-is-no-such-command" in done.stderr
    done = run("--key", "a", "--", script("plain.txt", "no program"))
    assert (done.returncode, attempts(done.stderr)) == (126, 1)
    done = run("--key", "a", "--", script("plain.txt", "no program").parent)
    assert (done.returncode, attempts(done.stderr)) == (126, 1)


def test_words_and_streams_are_the_commands_own():
    assert run("--key", "a", "printf", "%s|", "--json", "-x y", "$HOME", "*").stdout == "--json|-x y|$HOME|*|"
    assert run("--key", "a", "--", "printf", "%s|", "--", "--key").stdout == "--|--key|"
    done = run("--key", "a", "--quiet", "--", "cat", stdin=None, input="what comes in")
    assert (done.stdout, done.stderr) == ("what comes in", "")
    done = run("--", "prog", "--json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")  # the command's --json is not ours


def test_whoever_reads_what_it_tells_may_leave():
    words = f"{shlex.join(RUN)} --key a -- sh -c 'sleep 0.2; exit 7'"
    done = subprocess.run(
        ["bash", "-c", f"{{ {words}; echo $? > code; }} 2> >(exec true)"],
        env=environment(), timeout=15, check=False, capture_output=True,
    )  # fmt: skip
    assert done.stderr == b""
    assert wait_for("code").read_text() == "7\n"


def test_open_files_are_handed_on():
    """Those of make's job server, for instance."""
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(RUN)} --key a -- sh -c 'echo three >&3' 3>three"],
        env=environment(), timeout=15, check=True, capture_output=True,
    )  # fmt: skip
    assert done.stdout == b""
    assert Path("three").read_text() == "three\n"


# --- who it is ---------------------------------------------------------------------------------


SAY = 'echo "$TASKCKPT_KEY|$TASKCKPT_RUN|${TASKCKPT_TASK-none}|$TASKCKPT_BASE|$TASKCKPT_KEEP"'


def test_the_environment_says_who_it_is():
    here = os.getcwd()
    base = f"{here}/.taskckpt"
    assert run("--key", "k", "--", "sh", "-c", SAY).stdout == f"k|local|none|{base}|3\n"
    done = run("--task", "t/1", "--run", "r", "--base", "b", "--keep", "best:2:loss", "--", "sh", "-c", SAY)
    assert done.stdout == f"|r|t/1|{here}/b|best:2:loss:min\n"
    outer = {"TASKCKPT_TASK": "outer", "TASKCKPT_RUN": "nightly", "TASKCKPT_KEEP": "all", "TASKCKPT_ATTEMPT": "4"}
    assert run("--", "sh", "-c", SAY, env=outer).stdout == f"|nightly|outer|{base}|all\n"
    assert run("--run", "other", "--", "sh", "-c", SAY, env=outer).stdout == f"|other|outer|{base}|all\n"
    assert run("--key", "k", "--", "sh", "-c", SAY, env=outer).stdout == f"k|nightly|none|{base}|all\n"
    assert run("--", "sh", "-c", "echo $TASKCKPT_ATTEMPT", env=outer).stdout == "0\n"


def test_a_python_command_resumes_under_the_same_name():
    task = script(
        "task.py",
        """
        import os, taskckpt
        cp = taskckpt.checkpoint()
        step = int(cp.load_bytes_sync() or 0)
        print(taskckpt.ctx().key, taskckpt.ctx().attempt, "goes on from", step)
        cp.save_sync(b"%d" % (step + 1), step=step + 1)
        if step < 2:
            os.kill(os.getpid(), 9)
        """,
    )
    done = run("--key", "train", "--", sys.executable, task)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "train 2 goes on from 2"
    assert checkpoint("train").load_bytes_sync() == b"3"


SLURM = {
    "SLURM_JOB_ID": "77", "SLURMD_NODENAME": "n1", "SLURM_CLUSTER_NAME": "main",
    "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "2",
}  # fmt: skip


def test_in_a_batch_job_each_command_is_a_task():
    """And the same again in a job that is requeued, but not in another item of the array."""

    def name(*words, **more):
        say = 'echo "$TASKCKPT_RUN|$TASKCKPT_TASK"'
        return run("--", "sh", "-c", say, *words, env={**SLURM, **more}).stdout.strip()

    assert name("a").startswith("slurm/main/70|sh-")
    assert name("a").endswith("/7")
    assert name("a") == name("a", SLURM_RESTART_COUNT="3", SLURM_JOB_ID="78")
    assert len({name("a"), name("b"), name("a", SLURM_ARRAY_TASK_ID="8"), name("a", SLURM_ARRAY_JOB_ID="71")}) == 4
    assert "secret" not in name("secret")


def test_alone_in_a_batch_job_a_script_must_be_named():
    """Two scripts of one job would be one task."""
    taskckpt("load", "-", code=2, env=SLURM)
    assert taskckpt("load", "-", "--key", "a", env=SLURM) == ""
    assert taskckpt("load", "-", env={**SLURM, "TASKCKPT_INDEX": "second"}) == ""
    assert run("--", "sh", "-c", "$TC load -", env=SLURM).returncode == 0


def test_each_attempt_is_one_of_its_own_though_the_outer_one_was_handed_down():
    """An outer run of the same name; its claims must not make the inner attempts join it."""
    words = [*RUN, "--key", "a", "--quiet", "--retries", "1"]
    inner = "echo $TASKCKPT_CLAIMS; exit $((1 - TASKCKPT_ATTEMPT))"
    done = run(
        "--key", "a", "--", "sh", "-c", f"echo $TASKCKPT_CLAIMS; exec {shlex.join(words)} -- sh -c {shlex.quote(inner)}"
    )
    first, *others = done.stdout.splitlines()
    of_first = dict(one.split(":") for one in first.split())
    assert len(others) == 2
    nonces = {of_first[digest] for digest in of_first}
    for line in others:
        nonces |= {dict(one.split(":") for one in line.split())[one.split(":")[0]] for one in line.split()}
    assert len(nonces) == 3
    newest = [dict(one.split(":") for one in line.split()) for line in others]
    assert newest[0][next(iter(of_first))] != of_first[next(iter(of_first))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--", "true"], "Which task"),
        (["--key", "a", "--task", "b", "--", "true"], "neither --task nor --run"),
        (["--key", " ", "--", "true"], "blank"),
        (["--key", "{{x}}", "--", "true"], "filled in"),
        (["--key", "a", "--retries", "-1", "--", "true"], "whole number"),
        (["--key", "a", "--retries", "many", "--", "true"], "whole number"),
        (["--key", "a", "--wait", "-1", "--", "true"], "from 0 on"),
        (["--key", "a", "--keep", "some", "--", "true"], "keep"),
        (["--key", "a", "--base", "s3:/x", "--", "true"], "s3"),
        (["--key", "a", "--base", "memory://b", "--", "true"], "one process"),
        (["--key", "a"], "COMMAND"),
        (["--key", "a", "--"], "COMMAND"),
    ],
)
def test_a_wrong_call_runs_nothing(words, says):
    done = CliRunner().invoke(main, ["run", *words])
    assert done.exit_code == 2
    assert says in done.stderr
    assert attempts(done.stderr) == 0


# --- two at once -------------------------------------------------------------------------------


def test_of_two_at_once_the_newest_wins_and_the_other_ends(begun):
    """It is not tried again: the two would take the task from each other until both had no tries left."""
    task = script(
        "task.py",
        """
        import os, pathlib, sys, time, taskckpt
        me = sys.argv[1]
        cp = taskckpt.checkpoint()
        cp.load_bytes_sync()
        cp.save_sync(me.encode())
        pathlib.Path(me + "-saved").touch()
        while not pathlib.Path(me + "-go").exists():
            time.sleep(0.01)
        cp.save_sync(me.encode() + b" again")
        """,
    )
    first = begun("--key", "train", "--", sys.executable, task, "first")
    wait_for("first-saved")
    second = begun("--key", "train", "--", sys.executable, task, "second")
    wait_for("second-saved")
    Path("first-go").touch()
    _, err = first.communicate(timeout=10)
    assert first.returncode == 5, err
    assert attempts(err) == 1
    assert "StaleAttemptError" in err
    assert "Another attempt took the task over" in err.splitlines()[-1]
    Path("second-go").touch()
    second.communicate(timeout=10)
    assert second.returncode == 0
    assert checkpoint("train").load_bytes_sync() == b"second again"


def test_what_an_attempt_left_running_is_fenced_by_the_next():
    left = script(
        "left.py",
        """
        import pathlib, time, taskckpt
        cp = taskckpt.checkpoint()
        cp.save_sync(b"of the first attempt")
        pathlib.Path("left-saved").touch()
        while not pathlib.Path("second-saved").exists():
            time.sleep(0.01)
        try:
            cp.save_sync(b"too late")
        except taskckpt.StaleAttemptError:
            pathlib.Path("was-stale").touch()
        """,
    )
    job = script(
        "job.sh",
        f"""
        if [ $TASKCKPT_ATTEMPT = 0 ]; then
            {sys.executable} {left} >/dev/null 2>&1 &
            while [ ! -e left-saved ]; do sleep 0.02; done
            exit 1
        fi
        test "$($TC load -)" = "of the first attempt" && printf two | $TC save - && touch second-saved
        """,
    )
    assert run("--key", "a", "--", "sh", job).returncode == 0
    wait_for("was-stale")
    assert checkpoint("a").load_bytes_sync() == b"two"


# --- signals -----------------------------------------------------------------------------------

COUNTING = """
    import os, pathlib, signal, sys, time
    heard = []
    for one in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2"):
        signal.signal(getattr(signal, "SIG" + one), lambda number, _: heard.append(signal.Signals(number).name))
    pathlib.Path("ready").touch()
    until = time.monotonic() + 10
    while not heard and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)  # the same once more?
    pathlib.Path("heard").write_text(" ".join(heard))
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT"])
def test_a_signal_to_end_is_handed_on_once_and_ends_the_retries(begun, name):
    one = begun("--key", "a", "--", sys.executable, script("counting.py", COUNTING), "3")
    wait_for("ready")
    one.send_signal(getattr(signal, f"SIG{name}"))
    _, err = one.communicate(timeout=10)
    assert Path("heard").read_text() == f"SIG{name}"
    assert (one.returncode, attempts(err)) == (3, 1)


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_another_signal_is_handed_on_and_ends_nothing(begun, name):
    one = begun("--key", "a", "--retries", "1", "--", sys.executable, script("counting.py", COUNTING), "3")
    wait_for("ready")
    one.send_signal(getattr(signal, f"SIG{name}"))
    assert wait_for("heard")
    Path("ready").unlink()
    wait_for("ready").unlink()
    one.send_signal(getattr(signal, f"SIG{name}"))
    _, err = one.communicate(timeout=10)
    assert (one.returncode, attempts(err)) == (3, 2)


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_who_dies_of_a_signal_that_was_handed_on_is_not_tried_again(begun, name):
    one = begun("--key", "a", "--", "sh", "-c", "touch ready; exec sleep 20")
    wait_for("ready")
    time.sleep(0.1)
    one.send_signal(getattr(signal, f"SIG{name}"))
    _, err = one.communicate(timeout=10)
    assert (one.returncode, attempts(err)) == (128 + getattr(signal, f"SIG{name}"), 1)


def test_a_signal_between_attempts_ends_it(begun):
    one = begun("--key", "a", "--wait", "20", "--", "sh", "-c", "touch ready; exit 1")
    wait_for("ready")
    time.sleep(0.3)
    one.send_signal(signal.SIGTERM)
    _, err = one.communicate(timeout=10)
    assert (one.returncode, attempts(err)) == (128 + signal.SIGTERM, 1)
    assert "SIGTERM: no more attempts" in err


def test_ctrl_c_reaches_the_command_once():
    """The terminal sends it to both: handed on, it would come twice."""
    task = script("counting.py", COUNTING)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(RUN[0], [*RUN, "--key", "a", "--", sys.executable, str(task), "3"], environment())
    wait_for("ready")
    os.write(terminal, b"\x03")
    told = b""
    try:
        while part := os.read(terminal, 4096):
            told += part
    except OSError:  # EIO: all have closed it
        pass
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 3
    assert Path("heard").read_text() == "SIGINT"
    assert attempts(told.decode()) == 1


def test_what_is_ignored_stays_ignored(begun):
    """As nohup does: neither it nor the command hears it."""
    one = begun("--key", "a", "--", "sh", "-c", "touch ready; sleep 0.5; echo alive", before=["nohup"])
    wait_for("ready")
    one.send_signal(signal.SIGHUP)
    out, err = one.communicate(timeout=10)
    assert (one.returncode, out) == (0, "alive\n"), err


def test_the_command_has_the_signals_as_they_are_by_default():
    def masks(text):
        # Two belong to the C library, which leaves them ignored in what it spawns.
        return [int(line.split()[1], 16) & ~(0b11 << 31) for line in text.splitlines()]

    say = ["sh", "-c", "grep ^Sig[BI] /proc/self/status"]
    bare = subprocess.run(say, capture_output=True, text=True, check=False)
    if bare.returncode:
        pytest.skip("needs /proc/self/status: Linux")
    assert masks(run("--key", "a", "--", *say).stdout) == masks(bare.stdout)


def test_as_the_first_process_of_a_container(begun):
    """There, the kernel drops what is not waited for; and orphans are somebody else's to wait for."""
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*container, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("needs Linux, unshare and the right to make namespaces: run it as root")
    job = "trap 'exit 9' TERM; (sleep 0.05 &); touch ready; while :; do sleep 0.05; done"
    one = begun("--key", "a", "--", "sh", "-c", job, before=container)
    wait_for("ready")
    time.sleep(0.2)
    inside = Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split()[0]
    os.kill(int(inside), signal.SIGTERM)
    _, err = one.communicate(timeout=10)
    assert (one.returncode, attempts(err)) == (9, 1), err


# --- save and load, in a shell script ----------------------------------------------------------


def test_a_shell_script_resumes():
    job = script(
        "job.sh",
        """
        set -eu
        n=$($TC load -); n=${n:-0}
        echo "attempt $TASKCKPT_ATTEMPT goes on from $n"
        while [ "$n" -lt 4 ]; do
            n=$((n + 1))
            printf "$n" | $TC save - --step "$n" --metric loss=$((10 - n))
            if [ "$n" = 2 ]; then kill -KILL $$; fi
        done
        """,
    )
    done = run("--key", "sums", "--", "bash", job)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "attempt 0 goes on from 0\nattempt 1 goes on from 2\n"
    infos = Checkpoint.of(key="sums").checkpoints_sync()
    assert [(one.step, one.attempt, one.metrics) for one in infos] == [
        (4, 1, {"loss": 6}),
        (3, 1, {"loss": 7}),
        (2, 0, {"loss": 8}),
    ]


def test_folders_come_back_and_nothing_is_nothing():
    job = script(
        "job.sh",
        """
        set -eu
        restored=$($TC load work)
        echo "restored: $restored"
        if [ -z "$restored" ]; then mkdir -p work/sub; fi
        echo "$TASKCKPT_ATTEMPT" >> work/sub/attempts
        $TC save work
        exit $((1 - TASKCKPT_ATTEMPT))
        """,
    )
    done = run("--key", "folder", "--", "sh", "-c", f"rm -rf work; exec sh {job}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"restored: \nrestored: {os.getcwd()}/work\n"
    assert Path("work/sub/attempts").read_text() == "0\n1\n"


def taskckpt(*words, code=0, **options):
    """``save`` and ``load`` alone."""
    done = subprocess.run(
        [*TASKCKPT, *map(str, words)], env=environment(**options.pop("env", {})),
        check=False, capture_output=True, text=True, timeout=15, **options,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


def test_without_a_run_they_are_named_and_take_the_task_over():
    Path("state.txt").write_text("seven")
    assert taskckpt("load", "restored", "--key", "a") == ""
    assert not Path("restored").exists()
    assert taskckpt("save", "state.txt", "--key", "a", "--step", "7") == ""
    mine = checkpoint("a")
    assert mine.load_bytes_sync() == b"seven"
    taskckpt("save", "state.txt", "--key", "a", "--step", "7", code=9)
    told = json.loads(taskckpt("save", "state.txt", "--key", "a", "--step", "7", "--overwrite", "--json"))
    assert told["checkpoint"]["step"] == 7
    with pytest.raises(Exception, match="newer attempt"):
        mine.save_sync(b"too late")
    assert taskckpt("load", "restored", "--key", "a") == f"{os.getcwd()}/restored/state.txt\n"
    assert Path("restored/state.txt").read_text() == "seven"
    taskckpt("load", "restored", "--key", "a", code=9)
    told = json.loads(taskckpt("load", "restored", "--key", "a", "--replace", "--json"))
    assert (told["checkpoint"]["step"], told["path"]) == (7, f"{os.getcwd()}/restored/state.txt")
    told = json.loads(taskckpt("load", "new", "--key", "empty", "--json"))
    assert (told["checkpoint"], told["path"]) == (None, None)


def test_what_is_not_there_or_not_known_is_an_error():
    taskckpt("save", "absent", "--key", "a", code=3)
    taskckpt("save", "-", code=2, input="x")
    taskckpt("load", "-", code=2)
    taskckpt("load", "-", "--key", "a", "--json", code=2)
    taskckpt("save", "-", "--key", "a", "--metric", "loss", code=2, input="x")
    Path("file").touch()
    taskckpt("load", "-", "--key", "a", "--base", "file", code=2)
